"""The data sets of generation and of multiple choice: what their rows become."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from support.hub_server import Repository

from llmft.config.custom_task import EXAMPLE_METRICS
from llmft.config.spec import DataRef
from llmft.data.task import GenerationTask
from llmft.errors import UserError
from llmft.tasks._registry import TASKS, load_task
from llmft.tasks.narrative_qa import VALIDATION

COMMIT = "c" * 40


def rows_of(data_dir: str, name: str) -> list[dict]:
    if not (Path(data_dir) / name).is_file():
        pytest.skip(f"no {name} in {data_dir}: set LLMFT_TEST_DATA to a folder that holds it")
    return parquet.read_table(f"{data_dir}/{name}").to_pylist()


def write(folder: Path, name: str, rows: list[dict]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), folder / name)


@pytest.fixture
def folder(tmp_path, data_dir) -> Path:
    """The real test sets, and small train sets made of real rows of other splits."""
    for name in ("dialogsum_test", "samsum_test", "narrativeqa_validation", "commonsenseqa_train", "commonsenseqa_validation"):
        rows_of(data_dir, f"{name}.parquet")
        shutil.copy(f"{data_dir}/{name}.parquet", tmp_path)
    write(tmp_path, "dialogsum_train.parquet", rows_of(data_dir, "dialogsum_validation.parquet"))
    write(tmp_path, "samsum_train.parquet", rows_of(data_dir, "samsum_test.parquet")[:50])
    write(tmp_path, "narrativeqa_train.parquet", rows_of(data_dir, "narrativeqa_validation.parquet")[:50])
    return tmp_path


def load(name: str, folder: Path):
    task = load_task(name)
    data = task.resolve_data(str(folder))
    assert len(data.fingerprint) == 16
    return task.load(data)


def sizes(data) -> dict:
    return {test.name: (test.domain, len(test.examples)) for test in data.tests}


def n_references(examples) -> Counter:
    return Counter(len(example.references) for example in examples)


def test_commonsense_qa_has_its_published_size(folder):
    data = load("commonsense_qa", folder)
    assert len(data.pool) == 9741 and sizes(data) == {"commonsense_qa": ("in", 1221)}
    assert {example.label for example in data.pool} == set(range(5))


def test_commonsense_qa_reads_as_in_the_harness(folder):
    data, task = load("commonsense_qa", folder), load_task("commonsense_qa")
    row = parquet.read_table(folder / "commonsenseqa_train.parquet").slice(0, 1).to_pylist()[0]
    a, b, c, d, e = row["choice_texts"]
    expected = f"Question: {row['question']}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nE. {e}\nAnswer:"  # its doc_to_text
    assert task.patterns["eval-harness"].render(data.pool[0].fields) == expected
    shown = task.patterns["eval-harness"].render_labelled(data.pool[0].fields, task.labels[data.pool[0].label])
    assert shown == f"{expected} {row['answerKey']}"


def test_dialogsum_and_samsum_are_each_others_out_of_domain_set(folder):
    data = load("dialogsum", folder)
    assert sizes(data) == {"dialogsum": ("in", 500), "samsum": ("out", 819)} and len(data.pool) == 500
    assert n_references(data.tests[0].examples) == {3: 500} and n_references(data.tests[1].examples) == {1: 819}
    assert n_references(data.pool) == {1: 500}
    turned = load("samsum", folder)
    assert sizes(turned) == {"samsum": ("in", 819), "dialogsum": ("out", 500)}
    assert turned.tests[0].examples == data.tests[1].examples
    assert not any("\r" in example.fields["dialogue"] for example in turned.tests[0].examples)


def test_narrative_qa_has_its_published_size_and_two_answers(folder):
    data = load("narrative_qa", folder)
    assert sizes(data) == {"narrative_qa": ("in", 3461)} and n_references(data.tests[0].examples) == {2: 3461}
    first = data.tests[0].examples[0]
    assert first.fields["question"].startswith("WHO NORMALLY") and first.references[1] == "The actor in the black cloak"


def on_the_hub(server, name: str, files: dict[str, list[dict]], tmp_path: Path, branch: str) -> None:
    content = {}
    for path, rows in files.items():
        write(tmp_path, "rows.parquet", rows)
        content[path] = (tmp_path / "rows.parquet").read_bytes()
    server.repositories[f"datasets/{name}"] = Repository({COMMIT: content}, {branch: COMMIT})


def test_the_hubs_rows_of_dialogues_are_the_same_examples(folder, server, new_cache, tmp_path):
    """On the hub DialogSum's references stand in three rows, and one row of SAMSum's train set has no dialogue."""
    local = load("dialogsum", folder)
    tests = parquet.read_table(folder / "dialogsum_test.parquet").to_pylist()
    long = [{"id": f"{r['id']}_{i}", "dialogue": r["dialogue"], "summary": s} for r in tests for i, s in enumerate(r["summaries"], 1)]
    train = parquet.read_table(folder / "dialogsum_train.parquet").to_pylist()
    samsum = parquet.read_table(folder / "samsum_test.parquet").to_pylist()
    converted = "refs/convert/parquet"
    files = {"default/train/0000.parquet": train, "default/test/0000.parquet": long}
    on_the_hub(server, "knkarthick/dialogsum", files, tmp_path, converted)
    files = {"default/train/0000.parquet": [samsum[0] | {"dialogue": None}, *samsum[1:9]], "default/test/0000.parquet": samsum}
    on_the_hub(server, "knkarthick/samsum", files, tmp_path, converted)
    new_cache()
    task = load_task("dialogsum")
    assert len(long) == 1500
    found = task.load(task.resolve_data(None))
    content = [
        [(e.fields, e.references) for e in examples]
        for data in (local, found)
        for examples in (data.pool, *(t.examples for t in data.tests))
    ]
    assert content[:3] == content[3:]
    samsum_task = load_task("samsum")
    assert len(samsum_task.load(samsum_task.resolve_data(None)).pool) == 8


def test_the_hubs_rows_of_narrative_qa_are_the_same_examples_and_its_books_stay_unread(folder, server, new_cache, tmp_path):
    rows = parquet.read_table(folder / "narrativeqa_validation.parquet").slice(0, 20).to_pylist()
    nested = [
        {
            "document": {"id": r["document_id"], "text": "a whole book", "summary": {"text": r["summary"], "tokens": ["x"]}},
            "question": {"text": r["question"], "tokens": ["x"]},
            "answers": [{"text": text, "tokens": ["x"]} for text in r["answers"]],
        }
        for r in rows
    ]
    files = {f"data/{split}-0000{i}-of-00002.parquet": nested[10 * i : 10 * i + 10] for split in ("train", "validation") for i in (0, 1)}
    on_the_hub(server, "deepmind/narrativeqa", files, tmp_path, "main")
    new_cache()
    task = load_task("narrative_qa")
    data = task.resolve_data(None)
    assert VALIDATION.rows(data)[0].keys() == {"document", "question", "answers"}
    assert VALIDATION.rows(data)[0]["document"] == {"summary": {"text": rows[0]["summary"]}}
    assert [e.fields | {"r": e.references} for e in task.load(data).pool] == [
        {"summary": r["summary"].strip(), "question": r["question"].strip(), "r": tuple(a.strip() for a in r["answers"])} for r in rows
    ]


def test_the_hubs_rows_of_commonsense_qa_are_the_same_examples(folder, server, new_cache, tmp_path):
    local = load("commonsense_qa", folder)
    files = {}
    for split in ("train", "validation"):
        rows = parquet.read_table(folder / f"commonsenseqa_{split}.parquet").slice(0, 30).to_pylist()
        files[f"data/{split}-00000-of-00001.parquet"] = [
            {
                **r,
                "choices": {"label": r["choice_labels"], "text": r["choice_texts"]},
                "choice_labels": None,
                "choice_texts": None,
            }
            for r in rows
        ]
    on_the_hub(server, "tau/commonsense_qa", files, tmp_path, "main")
    new_cache()
    task = load_task("commonsense_qa")
    assert task.load(task.resolve_data(None)).pool == local.pool[:30]


@pytest.mark.parametrize(
    ("task", "name", "change", "said"),
    [("dialogsum", "dialogsum_train", {"summary": " "}, "dialogsum_train, row 4: the references [' '] must be texts"),
     ("dialogsum", "dialogsum_test", {"summaries": ["a", ""]}, "dialogsum_test, row 4: the references ['a', '']"),
     ("narrative_qa", "narrativeqa_train", {"answers": []}, "narrativeqa_train, row 4: the references []"),
     ("narrative_qa", "narrativeqa_train", {"question": None}, "row 4: column 'question' is missing"),
     ("commonsense_qa", "commonsenseqa_validation", {"answerKey": "F"}, "commonsenseqa_validation, row 4: choices"),
     ("commonsense_qa", "commonsenseqa_validation", {"choice_texts": ["a"] * 4}, "commonsenseqa_validation, row 4: choices")],
)  # fmt: skip
def test_a_wrong_row_is_named(folder, task, name, change, said):
    rows = parquet.read_table(folder / f"{name}.parquet").slice(0, 6).to_pylist()
    rows[3] |= change
    write(folder, f"new_{name}.parquet", rows)
    (folder / f"{name}.parquet").unlink()
    (folder / f"new_{name}.parquet").rename(folder / f"{name}.parquet")
    with pytest.raises(UserError) as raised:
        load_task(task).load(DataRef(directory=str(folder)))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name in TASKS if isinstance(load_task(name), GenerationTask)])
def test_a_generation_task_names_a_score_of_single_texts(name):
    task = load_task(name)
    assert task.metric in EXAMPLE_METRICS and task.labels == () and "minimal" in task.patterns
