"""A task of the user's own: plain data and files, no Python."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError
from support.small_models import CPU

from llmft.config.custom_task import CustomTask, definition_keys, in_full, label_text
from llmft.config.spec import GenerationSpec, TrialSpec
from llmft.data.custom import TableTask, complete
from llmft.errors import UserError, error_lines
from llmft.trial.preparation import encode_prompts, prepare_trial
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


def content(folder, **changed) -> dict:
    test = {"in_domain": f"{folder}/test.csv", "out_of_domain": {"other": f"{folder}/other.jsonl"}}
    usual = {
        "name": "mine", "train": f"{folder}/train.csv", "test": test, "columns": {"premise": "s1", "hypothesis": "s2"},
        "label": "gold", "labels": {"entailment": "yes", "not_entailment": "no"}, "groups": ["from"],
        "patterns": {"minimal": "{premise} {hypothesis} ?"}, "verbalizers": {"yes-no": ["Yes", "No"]},
    }  # fmt: skip
    return {name: value for name, value in (usual | changed).items() if value is not None}


def define(folder, **changed) -> CustomTask:
    return CustomTask.model_validate_json(json.dumps(content(folder, **changed)))


def whole(definition: CustomTask):
    task = TableTask(definition)
    data = task.resolve_data()
    completed = complete(definition, data)
    return TableTask(completed), TableTask(completed).load(data), data


def test_the_rows_are_those_of_the_files(folder):
    task, data, _ = whole(define(folder))
    assert task.labels == ("entailment", "not_entailment") and (task.in_domain, task.out_of_domain) == ("mine", ("other",))
    first = data.pool[0]
    assert (first.id, dict(first.fields), first.label, dict(first.groups)) == (
        "train/0", {"premise": "doctor 0", "hypothesis": "nurse 0"}, 1, {"from": "a"},
    )  # fmt: skip
    assert [(test.name, test.domain, len(test.examples)) for test in data.tests] == [("mine", "in", 40), ("other", "out", 40)]
    assert task.patterns["minimal"].render(first.fields) == "doctor 0 nurse 0 ?" and task.patterns["minimal"].verbalizer == "yes-no"


def test_what_is_left_out_is_filled_in(folder):
    plain = {"patterns": {"minimal": "{s1} {s2} ?"}, "columns": None, "labels": None, "verbalizers": None}
    task, data, _ = whole(define(folder, **plain))
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
        _, data, _ = whole(define(folder, labels=labels, test={"in_domain": f"{folder}/{file}"}))
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
    assert whole(definition)[0].labels == tuple(map(str, range(12)))  # 2 before 10


def test_label_text():
    assert [label_text(value) for value in (1, 1.0, "1", "1.0", True, "True", "true", " a", "inf", "01")] == [
        "1", "1", "1", "1", "true", "true", "true", " a", "inf", "1"
    ]  # fmt: skip


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [("train.csv", "doctor 3,nurse 3,yes", "doctor 3,nurse 3,maybe", "train.csv, line 5: label 'maybe' in column 'gold' is not one of yes, no"),
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
    edit(folder / file, old, new)
    with pytest.raises(UserError) as raised:
        whole(define(folder))
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
        whole(define(folder, **changed))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"patterns": {"minimal": "{premise} {hypotesis} ?"}}, "patterns.minimal: {hypotesis} is no field of the task. Fields: premise, hypothesis"),
     ({"patterns": {"minimal": "What?"}}, "patterns.minimal.template: a template must name a field"),
     ({"patterns": {}}, "patterns: "),
     ({"patterns": {"minimal": {"template": "{premise}", "verbalizer": "words"}}}, "unknown verbalizer 'words'. Verbalizers: yes-no"),
     ({"patterns": {"minimal": {"template": "{premise}", "prefix": ""}}}, "unknown key 'patterns.minimal.prefix'. Did you mean 'label_prefix'?"),
     ({"verbalizers": {"yes-no": ["Yes"]}}, "verbalizers.yes-no: 1 words for 2 labels"),
     ({"verbalizers": {"yes-no": ["Yes", "Yes"]}}, "every label needs a word of its own"),
     ({"verbalizers": {"yes-no": [True, False]}}, 'true and false are no words in YAML; write "True" and "False" in quotes'),
     ({"labels": {"a": 1, "b": "1.0"}}, "labels: two labels have the same value"),
     ({"labels": {"a": 1}}, "labels: one label is nothing to tell apart"),
     ({"trian": "x.csv"}, "unknown key 'trian'. Did you mean 'train'?"),
     ({"train": None}, "train: is missing"),
     ({"train": {"hub": {"repository": "a/b"}}}, "train.hub.split: is missing"),
     ({"train": {}}, "train: give a file, or hub"),
     ({"test": {"in_domain": "a.csv", "out_domain": {}}}, "unknown key 'test.out_domain'. Did you mean 'out_of_domain'?"),
     ({"test": {"in_domain": "a.csv", "out_of_domain": {"dev": "b.csv"}}}, "a test set cannot be called 'dev'"),
     ({"test": {"in_domain": "a.csv", "out_of_domain": {"mine": "b.csv"}}}, "a test set cannot be called 'mine'"),
     ({"train": "a.csv", "test": {"in_domain": "a.csv"}}, "test: a.csv is also the training pool"),
     ({"dev": "a.csv", "test": {"in_domain": "a.csv"}}, "dev: a.csv selects checkpoints and hyper-parameters, and is also reported"),
     ({"dev": "a.csv", "train": "a.csv"}, "and is also the training pool; leave dev out"),
     ({"name": "train"}, "a test set cannot be called 'train'"), ({"kind": "regression"}, "kind: "), ({"name": "a/b"}, "name: ")],
)  # fmt: skip
def test_a_wrong_definition_is_one_line(folder, changed, said):
    given = content(folder, **changed)
    with pytest.raises(ValidationError) as raised:
        CustomTask.model_validate_json(json.dumps(given))
    known = {key.removeprefix("mine").lstrip("."): fields for key, fields in definition_keys("mine", given).items()}
    text = error_lines(raised.value, "plan.yaml", known)
    assert said in text and "\n" not in text


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
        edit(folder / name, "doctor 1", "lawyer 1")
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
        {"labels": {"entailment": "no", "not_entailment": "yes"}}, {"labels": {"not_entailment": "no", "entailment": "yes"}}, {"columns": {"premise": "s2", "hypothesis": "s1"}},
        {"dev": f"{folder}/dev.jsonl"}, {"test": {"in_domain": f"{folder}/test.csv"}},
    ]  # fmt: skip
    assert len({own_spec(changed=changed).digest for changed in other} | {base}) == len(other) + 1
    edit(folder / "train.csv", "doctor 0,", "doctor zero,")
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
    edit(folder / "train.csv", "doctor 7,nurse 7,yes", "doctor 7,nurse 7,yse")
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
    task, data, ref = whole(define(folder, train=hub))
    assert ref.commits == (("owner/mine", "main", commit),) and len(data.pool) == 40
    server.stop()
    assert task.load(ref).pool == data.pool


# --- tasks that generate text

PAIRS = [{"question": f"Who is {i}?", "answers": [f"Doctor {i}", f"Nurse {i}"], "hint": "a guess" if i % 2 else ""} for i in range(30)]
ALPACA_ROWS = [{"instruction": f"Say {i}.", "input": "" if i % 2 else f"in word {i}", "output": f"number {i}"} for i in range(30)]


@pytest.fixture
def texts(tmp_path):
    """pairs.jsonl and pairs_test.parquet with lists of references, alpaca.jsonl, alpaca_test.csv, lamini.jsonl without inputs."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    parquet.write_table(
        pa.Table.from_pylist([row | {"question": f"And {row['question']}"} for row in PAIRS]), tmp_path / "pairs_test.parquet"
    )
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA_ROWS))
    lines = ["instruction,input,output", *(f"Now say {i}.,{'' if i % 2 else i},number {i}" for i in range(20))]
    (tmp_path / "alpaca_test.csv").write_text("\n".join(lines))
    lamini = [{"instruction": row["instruction"], "response": row["output"]} for row in ALPACA_ROWS]
    (tmp_path / "lamini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lamini))
    return tmp_path


def of_texts(folder, **changed) -> dict:
    usual = {
        "name": "mine", "kind": "generation", "train": f"{folder}/pairs.jsonl", "test": {"in_domain": f"{folder}/pairs_test.parquet"},
        "columns": {"prompt": "question"}, "references": "answers", "metric": "token_f1", "max_new_tokens": 6,
        "patterns": {"plain": "{prompt}\nAnswer:"},
    }  # fmt: skip
    return {name: value for name, value in (usual | changed).items() if value is not None}


def alpaca(folder, **changed) -> dict:
    """All that one writes."""
    written = {
        "name": "mine",
        "kind": "generation",
        "format": "alpaca",
        "train": f"{folder}/alpaca.jsonl",
        "test": f"{folder}/alpaca_test.csv",
    }
    return {name: value for name, value in (written | changed).items() if value is not None}


def define_texts(content: dict) -> CustomTask:
    return CustomTask.model_validate_json(json.dumps(in_full(content)))


def test_pairs_of_prompt_and_completion_with_any_columns(texts):
    task, data, _ = whole(define_texts(of_texts(texts)))
    assert (task.kind, task.labels, task.metric, task.generation.max_new_tokens) == ("generation", (), "token_f1", 6)
    first = data.pool[0]
    assert (first.id, dict(first.fields), first.label, first.references) == (
        "train/0",
        {"prompt": "Who is 0?"},
        None,
        ("Doctor 0", "Nurse 0"),
    )
    assert task.patterns["plain"].render(first.fields) == "Who is 0?\nAnswer:"
    assert data.tests[0].examples[3].references == ("Doctor 3", "Nurse 3")


def test_alpacas_files_need_no_columns_and_no_pattern(texts):
    task, data, _ = whole(define_texts(alpaca(texts)))
    (pattern,) = task.patterns.values()
    with_input, without = data.pool[0], data.pool[1]
    assert pattern.render(with_input.fields) == (  # PROMPT_DICT of stanford_alpaca's train.py
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 0.\n\n### Input:\nin word 0\n\n### Response:"
    )
    assert pattern.render(without.fields) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 1.\n\n### Response:"
    )
    assert pattern.render_labelled(without.fields, without.references[0]).endswith("### Response: number 1")
    assert pattern.render(data.tests[0].examples[1].fields).endswith("### Instruction:\nNow say 1.\n\n### Response:")
    assert task.generation.max_new_tokens == 256


def test_what_a_format_stands_for_can_be_said_otherwise(texts):
    given = alpaca(
        texts, train=f"{texts}/lamini.jsonl", references="response", metric="rouge1", test={"in_domain": f"{texts}/lamini.jsonl"}
    )
    with pytest.raises(ValidationError, match="is also the training pool"):
        define_texts(given)
    (texts / "lamini_test.jsonl").write_text((texts / "lamini.jsonl").read_text().replace("Say", "Tell"))
    task, data, _ = whole(define_texts(given | {"test": f"{texts}/lamini_test.jsonl", "patterns": {"short": "{instruction}"}}))
    assert list(task.patterns) == ["alpaca", "short"] and task.metric == "rouge1"
    assert data.pool[2].fields == {"instruction": "Say 2.", "input": ""} and data.pool[2].references == ("number 2",)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [("pairs.jsonl", '["Doctor 4", "Nurse 4"]', "[]", "pairs.jsonl, line 5, column 'answers': the references [] must be texts"),
     ("pairs.jsonl", '["Doctor 4", "Nurse 4"]', '["a", " "]', "line 5, column 'answers': the references ['a', ' '] must be texts"),
     ("pairs.jsonl", '["Doctor 4", "Nurse 4"]', "4", "line 5, column 'answers': the references 4 must be texts"),
     ("pairs.jsonl", '"Who is 4?"', '""', "pairs.jsonl, line 5: column 'question' holds no text"),
     ("pairs.jsonl", '"answers"', '"answer"', "pairs.jsonl, line 1: there is no column 'answers'")],
)  # fmt: skip
def test_a_wrong_row_of_texts_is_named_with_its_file(texts, file, old, new, said):
    edit(texts / file, old, new)
    with pytest.raises(UserError) as raised:
        whole(define_texts(of_texts(texts)))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_rows_without_a_reference_are_left_out_where_one_says_so(texts):
    edit(texts / "alpaca.jsonl", '"output": "number 4"', '"output": " "')
    with pytest.raises(UserError, match="alpaca.jsonl, line 5, column 'output': the references .* must be texts"):
        whole(define_texts(alpaca(texts)))
    _, data, _ = whole(define_texts(alpaca(texts, drop_empty=True)))
    assert [example.id for example in data.pool] == [f"train/{i}" for i in range(30) if i != 4]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"references": None}, "references: name the column that holds the texts"),
     ({"kind": None, "metric": None}, "references is for kind: generation"),
     ({"labels": ["a", "b"]}, "labels, verbalizers and groups are for kind: classification"),
     ({"groups": ["hint"]}, "labels, verbalizers and groups are for kind: classification"),
     ({"metric": "bleu"}, "metric: "), ({"format": "alpacca"}, "format: unknown format 'alpacca'. Formats: alpaca"),
     ({"patterns": {"a": {"template": "{prompt}", "without": "{prompt} ."}}}, "without must name some of the template's fields")],
)  # fmt: skip
def test_a_wrong_definition_of_texts_is_one_line(texts, changed, said):
    with pytest.raises(ValueError) as raised:
        define_texts(of_texts(texts, **changed))
    text = error_lines(raised.value, "plan.yaml") if isinstance(raised.value, ValidationError) else str(raised.value)
    assert said in text and "\n" not in text


@pytest.fixture
def text_spec(spec_of):
    def make(content: dict, method: str = "pattern", **fields) -> TrialSpec:
        definition = define_texts(content)
        data = TableTask(definition).resolve_data()
        completed = complete(definition, data)
        usual = {"task": "mine", "definition": completed, "data": data, "n_shots": 4, "n_dev": 2, "n_test": 3, "epochs": 1}
        generation = GenerationSpec(max_new_tokens=3)
        return spec_of(method, **usual | {"pattern": next(iter(completed.patterns)), "generation": generation} | fields)

    return make


def test_instruction_tuning_raises_the_response_alone(texts, text_spec):
    spec = TrialSpec.model_validate_json(text_spec(alpaca(texts)).model_dump_json())  # as a worker or a record has it
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    tokenizer = setting.decoding.tokenizer
    for shot, suffix, completion in zip(setting.draw.shots, encoded.sets["shots"].suffixes, encoded.sets["shots"].completions, strict=True):
        assert tokenizer.decode(completion) == f" {shot.references[0]}</s>"
        assert tokenizer.decode([*encoded.prefix, *suffix]).endswith("### Response:")
    record = run_trial(spec, CPU).record
    assert record.finished, record.message
    assert record.metrics["last"]["mine"].metric == "rougeL" and record.spec == spec


def test_the_digest_of_a_task_of_texts_is_of_what_counts(texts, text_spec):
    base = text_spec(of_texts(texts)).digest
    assert text_spec(of_texts(texts, patterns={"plain": "{prompt}\nAnswer:", "other": "{prompt}"}, label="unused")).digest == base
    other = [{"metric": "rouge1"}, {"patterns": {"plain": "{prompt}"}}, {"references": "question"}]
    assert len({text_spec(of_texts(texts, **changed)).digest for changed in other} | {base}) == len(other) + 1
