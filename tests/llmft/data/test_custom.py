"""Custom tasks with labels: their rows, labels, digests and mistakes in their files."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from support.custom_task_files import labelled_task, load_completed, parse_task, replace_text
from support.small_models import CPU

from llmft.config.custom_task import CustomTask
from llmft.config.spec import TrialSpec
from llmft.data.custom import TableTask, complete
from llmft.errors import UserError
from llmft.trial.run import run_trial

ROWS = [{"s1": f"doctor {i}", "s2": f"nurse {i}", "gold": ("no", "yes")[i % 2], "from": "ab"[i % 4 // 2]} for i in range(40)]
OTHER = [row | {"s1": row["s1"].upper()} for row in ROWS]


@pytest.fixture
def folder(tmp_path):
    """train.csv, test.csv, other.jsonl and dev.jsonl."""
    for name, rows in (("train.csv", ROWS), ("test.csv", [row | {"s2": f"{row['s2']} saw"} for row in ROWS])):
        (tmp_path / name).write_text("".join(",".join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)]))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OTHER))
    (tmp_path / "dev.jsonl").write_bytes((tmp_path / "other.jsonl").read_bytes())
    return tmp_path


def define(folder, **changed) -> CustomTask:
    return parse_task(labelled_task(folder, **changed))


def test_the_rows_are_those_of_the_files(folder):
    task, data, _ = load_completed(define(folder))
    assert task.labels == ("entailment", "not_entailment") and (task.in_domain, task.out_of_domain) == ("mine", ("other",))
    first = data.pool[0]
    assert (first.id, dict(first.fields), first.label, dict(first.groups)) == (
        "train/0", {"premise": "doctor 0", "hypothesis": "nurse 0"}, 1, {"from": "a"},
    )  # fmt: skip
    assert [(test.name, test.domain, len(test.examples)) for test in data.tests] == [("mine", "in", 40), ("other", "out", 40)]
    assert task.patterns["minimal"].render(first.fields) == "doctor 0 nurse 0 ?" and task.patterns["minimal"].verbalizer == "yes-no"


def test_what_is_left_out_is_filled_in(folder):
    plain = {"patterns": {"minimal": "{s1} {s2} ?"}, "columns": None, "labels": None, "verbalizers": None}
    task, data, _ = load_completed(define(folder, **plain))
    assert task.labels == ("no", "yes") and task.verbalizers == {"labels": ("no", "yes")}
    assert data.pool[0].fields == {"s1": "doctor 0", "s2": "nurse 0"} and data.pool[0].label == 0


@pytest.mark.parametrize("labels", [[1, 0], ["1", "0"], [1.0, 0.0], {"a": 1.0, "b": "0"}])
def test_a_label_is_the_same_in_every_kind_of_file(folder, labels):
    values = [1, 0, 1.0, 0.0] * 10
    rows = [row | {"gold": value} for row, value in zip(OTHER, values, strict=True)]
    (folder / "other.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist([row | {"gold": float(row["gold"])} for row in rows]), folder / "other.parquet")
    text = (folder / "train.csv").read_text().replace(",no,", ",0.0,").replace(",yes,", ",1,")
    (folder / "train.csv").write_text(text)
    for file in ("other.json", "other.parquet"):
        _, data, _ = load_completed(define(folder, labels=labels, test={"in_domain": f"{folder}/{file}"}))
        assert [example.label for example in data.tests[0].examples] == [0, 1] * 20
        assert [example.label for example in data.pool] == [1, 0] * 20


def test_any_number_of_classes_in_a_sensible_order(folder):
    lines = ["text,label"] + [f"text {i},{i % 12}" for i in range(48)]
    (folder / "many.csv").write_text("\n".join(lines))
    (folder / "few.csv").write_text("\n".join(lines[:13]).replace("text ", "line "))
    plain = dict.fromkeys(("columns", "labels", "groups", "verbalizers"))
    definition = define(
        folder,
        train=f"{folder}/many.csv",
        test={"in_domain": f"{folder}/few.csv"},
        label="label",
        patterns={"m": "{text} :"},
        **plain,
    )
    assert load_completed(definition)[0].labels == tuple(map(str, range(12)))  # 2 before 10


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [("train.csv", "doctor 3,nurse 3,yes", "doctor 3,nurse 3,maybe",
      "train.csv, line 5: label 'maybe' in column 'gold' is not one of yes, no"),
     ("test.csv", "doctor 4,nurse 4 saw", "doctor 4,", "test.csv, line 6: column 's2' holds no text (got '')"),
     ("test.csv", "doctor 4,", "  ,", "test.csv, line 6: column 's1' holds no text (got '  ')"),
     ("test.csv", "doctor 4,nurse 4 saw,no", "doctor 4,nurse 4 saw,", "test.csv, line 6: column 'gold' holds no label (got '')"),
     ("other.jsonl", '"s1": "DOCTOR 5"', '"s1": 5', "other.jsonl, line 6: column 's1' holds no text (got 5)"),
     ("other.jsonl", '"s1": "DOCTOR 5"', '"s1": null', "other.jsonl, line 6: column 's1' holds no text (got None)"),
     ("other.jsonl", '"DOCTOR 5", "s2": "nurse 5", "gold": "yes"', '"D", "s2": "n", "gold": null', "line 6: column 'gold' holds no label"),
     ("train.csv", "s1,s2", "sentence,s2", "train.csv: there is no column 's1' in the header. Columns: sentence, s2, gold, from"),
     ("train.csv", "gold", "label", "train.csv: there is no column 'gold' in the header"),
     ("other.jsonl", '"from"', '"source"', "other.jsonl, line 1: there is no column 'from'"),
     ("train.csv", "doctor 7,", "doctor, 7,", "train.csv, line 9: cannot be read (5 cells where there are 4 columns)")],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_file(folder, file, old, new, said):
    replace_text(folder / file, old, new)
    with pytest.raises(UserError) as raised:
        load_completed(define(folder))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"train": "none.csv"}, "none.csv: there is no such file"),
     ({"train": "{}/empty.csv"}, "empty.csv: holds no rows"),
     ({"labels": None, "label": "s2", "train": "{}/many.csv"}, "column 's2' holds 60 different values; name the task's labels"),
     ({"labels": None, "label": "from", "train": "{}/one.csv"}, "column 'from' holds 1 different values"),
     ({"labels": None, "patterns": {"a": "{premise}"}, "verbalizers": {"a": ["x", "y", "z"]}},
      "with the labels no, yes: verbalizers.a: 3 words for 2 labels")],
)  # fmt: skip
def test_files_and_columns_that_do_not_fit(folder, changed, said):
    (folder / "empty.csv").write_text("s1,s2,gold,from\n")
    (folder / "many.csv").write_text("s1,s2,gold,from\n" + "".join(f"a,b{i},yes,a\n" for i in range(60)))
    (folder / "one.csv").write_text("s1,s2,gold,from\na,b,yes,a\n")
    changed = {name: value.format(folder) if isinstance(value, str) else value for name, value in changed.items()}
    with pytest.raises(UserError) as raised:
        load_completed(define(folder, **changed))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture
def own_spec(spec_of, folder):
    def make(method: str = "in_context", changed: dict | None = None, **fields) -> TrialSpec:
        definition = define(folder, **(changed or {}))
        data = TableTask(definition).resolve_data()
        usual = {"task": "mine", "definition": complete(definition, data), "data": data, "n_shots": 4, "n_dev": 4}
        return spec_of(method, **usual | fields)

    return make


def test_a_trial_needs_nothing_but_its_spec_and_the_files(own_spec):
    spec = TrialSpec.model_validate_json(own_spec("pattern").model_dump_json())  # as a worker or a record has it
    record = run_trial(spec, CPU).record
    assert record.finished, record.message
    assert set(record.metrics["last"]) == {"mine", "other"} and record.metrics["last"]["other"].group_accuracy.keys() == {"from"}
    assert record.spec == spec and record.digest == spec.digest and hash(record.spec.definition) == hash(spec.definition)


def test_multi_token_words_and_three_classes_by_a_whole_trial(own_spec, folder):
    for name in ("train.csv", "test.csv"):
        replace_text(folder / name, "doctor 1", "lawyer 1")
        text = (folder / name).read_text().splitlines()
        rows = [line.replace(",yes,", ",maybe,") if i % 3 == 0 else line for i, line in enumerate(text)]
        (folder / name).write_text("\n".join(rows))
    changed = {
        "labels": ["yes", "no", "maybe"], "verbalizers": {"long": ["it is so", "it is not so", "who knows"]},
        "test": {"in_domain": f"{folder}/test.csv"},
    }  # fmt: skip
    record = run_trial(own_spec("in_context", changed, n_shots=6, n_dev=3), CPU).record
    assert record.finished, record.message
    assert set(record.metrics["none"]["mine"].label_shares) == {"yes", "no", "maybe"}


def test_the_digest_is_of_what_counts(own_spec, folder, tmp_path):
    base = own_spec().digest
    moved = tmp_path / "elsewhere.csv"
    moved.write_bytes((folder / "train.csv").read_bytes())
    same = [
        {"train": str(moved)}, {"description": "other words"}, {"patterns": {"minimal": "{premise} {hypothesis} ?", "other": "{premise}"}},
        {"verbalizers": {"yes-no": ["Yes", "No"], "spare": ["True", "False"]}},
    ]  # fmt: skip
    assert {own_spec(changed=changed).digest for changed in same} == {base}
    other = [
        {"patterns": {"minimal": "{premise} {hypothesis}"}}, {"verbalizers": {"yes-no": ["No", "Yes"]}}, {"groups": None},
        {"labels": {"entailment": "no", "not_entailment": "yes"}}, {"labels": {"not_entailment": "no", "entailment": "yes"}},
        {"columns": {"premise": "s2", "hypothesis": "s1"}},
        {"dev": f"{folder}/dev.jsonl"}, {"test": {"in_domain": f"{folder}/test.csv"}},
    ]  # fmt: skip
    assert len({own_spec(changed=changed).digest for changed in other} | {base}) == len(other) + 1
    replace_text(folder / "train.csv", "doctor 0,", "doctor zero,")
    assert own_spec().digest != base


def test_dev_of_its_own_and_rows_that_stand_in_training_and_test(own_spec, folder):
    (folder / "test.csv").write_bytes((folder / "train.csv").read_bytes())
    record = run_trial(own_spec("in_context", {"dev": f"{folder}/dev.jsonl"}, n_test=None), CPU).record
    assert {name.split("/")[0] for name in record.draws.dev} == {"dev"}
    assert {(finding.code, finding.set) for finding in record.findings} >= {("train_test_overlap", "mine")}


def test_too_few_examples_are_told_in_one_line(own_spec):
    record = run_trial(own_spec("in_context", n_shots=42), CPU).record
    assert record.cause == "user_error" and "21 shots and 2 dev examples of label 'entailment' are more than the 20" in record.message


def test_a_label_that_is_a_typo_is_named_with_its_line(own_spec, folder):
    replace_text(folder / "train.csv", "doctor 7,nurse 7,yes", "doctor 7,nurse 7,yse")
    inferred = {"labels": None, "verbalizers": None}
    record = run_trial(own_spec("zero_shot", inferred, n_shots=0, n_dev=9), CPU).record
    assert "n_dev: 3 dev examples of label 'yse' are more than the 1 that the training pool holds" in record.message
    assert "Use a smaller n_dev. If the label is a typo, correct it: it stands in" in record.message and "shots" not in record.message
    assert record.message.endswith("train.csv, line 9.")
    assert "yse" in (folder / "train.csv").read_text().splitlines()[8]


def test_rows_of_the_hub(server, new_cache, folder, tmp_path):
    new_cache()
    table = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    commit = server.push("datasets/owner/mine", {"all/train-00000-of-00001.parquet": table.getvalue().to_pybytes()})
    hub = {"hub": {"repository": "owner/mine", "configuration": "all", "split": "train", "revision": "main"}}
    task, data, ref = load_completed(define(folder, train=hub))
    assert ref.commits == (("owner/mine", "main", commit),) and len(data.pool) == 40
    server.stop()
    assert task.load(ref).pool == data.pool
