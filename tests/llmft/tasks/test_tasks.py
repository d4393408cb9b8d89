"""The tasks that come with llmft: counts from the publications, labels, patterns, and the faults of their first code."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from support.predictions import of_predictions

from llmft.config.patterns import with_literals
from llmft.data.sources import resolve_sources
from llmft.errors import UserError
from llmft.evaluation.findings import set_findings
from llmft.tasks._registry import TASKS, load_task
from llmft.tasks.qqp import original_subset, without_literals


@functools.cache
def loaded(name: str, folder: str):
    task = load_task(name)
    return task.load(task.resolve_data(folder))


def counts(name: str, folder: str) -> dict[str, tuple[int, ...]]:
    data, n_labels = loaded(name, folder), len(load_task(name).labels)
    return {test.name: tuple(sum(example.label == i for example in test.examples) for i in range(n_labels)) for test in data.tests}


HANS = dict.fromkeys(("hans", "hans_subsequence", "hans_constituent"), (5000, 5000))


@pytest.mark.parametrize(
    ("name", "n_pool", "expected"),
    [("rte", 2490, {"rte": (146, 131), **HANS}),
     ("mnli", 3285 + 3293, {"mnli": (3479, 3213), **HANS, "mnli_mismatched": (1710, 1420)}),  # here a part of pool and mismatched
     ("mnli_merged", 10_000, {"mnli_merged": (3479, 6336), **HANS, "mnli_mismatched": (1710, 2820)}),
     ("mnli_3way", 10_000, {"mnli_3way": (3479, 3123, 3213), "mnli_mismatched": (1710, 1400, 1420)}),
     ("qqp_full", 9917, {"qqp_full": (4944, 4973), "paws_qqp": (486, 191)}),  # here a part of QQP, balanced by its author
     ("cola", 8551, {"cola": (160, 367), "cola_ood": (162, 354)})],
)  # fmt: skip
def test_rows_and_labels(task_data, name, n_pool, expected):
    data = loaded(name, task_data)
    assert len(data.pool) == n_pool and counts(name, task_data) == expected
    task = load_task(name)
    assert [test.name for test in data.tests] == [task.in_domain, *task.out_of_domain]
    assert [test.domain for test in data.tests] == ["in"] + ["out"] * len(task.out_of_domain)
    everything = [example.id for test in data.tests for example in test.examples] + [example.id for example in data.pool]
    assert len(set(everything)) == len(everything)


def test_hans_is_the_same_for_rte_and_mnli(task_data):
    assert loaded("rte", task_data).tests[1:4] == loaded("mnli", task_data).tests[1:4]


def test_mnli_without_neutral_is_mnli_without_neutral(task_data):
    rows = parquet.read_table(Path(task_data) / "mnli_validation_matched.parquet").to_pylist()
    kept = [(row["premise"], row["hypothesis"], row["label"] // 2) for row in rows if row["label"] != 1]
    examples = loaded("mnli", task_data).tests[0].examples
    assert [(*example.fields.values(), example.label) for example in examples] == kept


def test_cola_holds_no_row_of_its_out_of_domain_set(task_data, data_dir):
    rows = parquet.read_table(Path(task_data) / "cola_validation.parquet").to_pylist()
    inside = [row["sentence"] for row in rows if row["domain"] == "in"]
    data = loaded("cola", task_data)
    assert [example.fields["sentence"] for example in data.tests[0].examples] == inside
    sources = Counter(example.groups["source"] for example in data.tests[1].examples)
    assert sources == {"swb04": 222, "w_80": 83, "clc95": 82, "s_97": 55, "j_71": 42, "c-05": 32}
    outside = {row["sentence"] for row in rows if row["domain"] == "out"}
    n_same = sum(example.fields["sentence"] in outside for example in data.tests[1].examples)
    assert n_same == 516 - 4  # four commas were corrected


def test_a_validation_set_of_cola_that_is_not_glues_is_refused(task_data, tmp_path):
    for path in Path(task_data).iterdir():
        if path.name != "cola_validation.parquet":
            (tmp_path / path.name).symlink_to(path)
    table = parquet.read_table(Path(task_data) / "cola_validation.parquet")
    parquet.write_table(table.slice(0, 527), tmp_path / "cola_validation.parquet")
    with pytest.raises(UserError, match="cola_validation.parquet: has 527 rows"):
        loaded("cola", str(tmp_path))


def test_the_subset_of_qqp_is_the_one_that_numpy_draws(tmp_path, task_data):
    lengths = {"train": 5_000, "validation": 3_000, "test": 4_000}
    np.random.seed(123)  # as the original: once, then split by split in this order
    drawn = {split: np.random.choice(np.arange(n), 1000, replace=False) for split, n in lengths.items()}
    assert [list(rows) for rows in original_subset([5_000, 3_000, 4_000])] == [list(rows) for rows in drawn.values()]
    for split in ("train", "validation"):
        rows = [{"question1": f"{split} {i}", "question2": "b", "label": i % 3 // 2, "idx": i} for i in range(lengths[split])]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"qqp_{split}.parquet")
    (tmp_path / "paws_qqp.tsv").symlink_to(Path(task_data) / "paws_qqp.tsv")
    data = loaded("qqp", str(tmp_path))
    for split, examples in (("train", data.pool), ("validation", data.tests[0].examples)):
        assert [example.fields["question1"] for example in examples] == [f"{split} {i}" for i in drawn[split]]
        assert [example.id for example in examples] == [f"qqp_{split}/{i}" for i in drawn[split]]
        assert [example.label for example in examples] == [i % 3 // 2 for i in drawn[split]]
    state = np.random.get_state()[1].copy()
    original_subset([10, 2_000])
    assert (np.random.get_state()[1] == state).all()  # numpy's own generator is left alone


def test_paws_is_read_as_what_its_literals_say(task_data, data_dir):
    clean = parquet.read_table(Path(data_dir) / "paws_qqp_clean.parquet").to_pylist()
    with (Path(task_data) / "paws_qqp.tsv").open(encoding="utf-8", newline="") as file:
        printed = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    examples = loaded("qqp_full", task_data).tests[1].examples
    assert [tuple(example.fields.values()) for example in examples] == [(row["sentence1"], row["sentence2"]) for row in clean]
    assert [example.label for example in examples] == [row["label"] for row in clean]
    cut = [(row["sentence1"][2:-1], row["sentence2"][2:-1]) for row in printed]  # the first code's way
    n_other = sum(tuple(example.fields.values()) != old for example, old in zip(examples, cut, strict=True))
    assert 0 < n_other < 20 and not any("\\x" in text for example in examples for text in example.fields.values())


def test_a_literal_that_is_none_is_named():
    assert without_literals({"sentence1": "b'l\\xc3\\xa9'", "sentence2": "bold"}, "x") == {
        "sentence1": "lé",
        "sentence2": "bold",
    }
    for text in ("b'open", "b'\\xff'"):
        with pytest.raises(UserError, match="paws, row 3: column 'sentence1' is no printed text"):
            without_literals({"sentence1": text, "sentence2": "b''"}, "paws, row 3")


@pytest.mark.parametrize("name", ["qqp", "cola"])
def test_a_set_that_the_hub_does_not_have_says_where_to_get_it(name, tmp_path):
    for folder in (None, str(tmp_path)):
        with pytest.raises(UserError, match="github.com/uds-lsv/llmft.*sha256 [0-9a-f]{64}") as raised:
            load_task(name).resolve_data(folder)
        assert "\n" not in str(raised.value) and ("--data-dir" in str(raised.value) or str(tmp_path) in str(raised.value))


def test_what_a_folder_lacks_comes_from_the_hub(server, new_cache, tmp_path, task_data):
    new_cache()
    source = Path(task_data)
    files = {f"cola/{split}-00000-of-00001.parquet": (source / f"cola_{split}.parquet").read_bytes() for split in ("train", "validation")}
    commit = server.push("datasets/nyu-mll/glue", files)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cola_ood.tsv").symlink_to(source / "cola_ood.tsv")
    task = load_task("cola")
    data = task.resolve_data(str(tmp_path / "data"))
    assert data.commits == (("nyu-mll/glue", "main", commit),) and data.fingerprint == task.resolve_data(task_data).fingerprint
    assert task.load(data).tests == loaded("cola", task_data).tests
    (tmp_path / "data" / "cola_train.parquet").symlink_to(source / "cola_train.parquet")  # half a repository is a mistake
    with pytest.raises(UserError, match="holds none of cola_validation.parquet"):
        task.resolve_data(str(tmp_path / "data"))
    server.stop()
    new_cache()
    (tmp_path / "data" / "cola_train.parquet").unlink()
    with pytest.raises(UserError, match="does not hold cola_train.parquet, cola_validation.parquet, and cannot get nyu-mll/glue"):
        task.resolve_data(str(tmp_path / "data"))


def test_the_label_words_are_the_published_ones():
    for name in TASKS:
        task = load_task(name)
        if task.kind == "generation":
            continue
        said = {
            pattern: dict(zip(task.labels, task.verbalizers[entry.verbalizer], strict=True)) for pattern, entry in task.patterns.items()
        }
        if name in ("rte", "mnli", "mnli_merged"):
            assert said["minimal"] == said["gpt-3"] == {"entailment": "Yes", "not_entailment": "No"}
            assert said["eval-harness"] == said["eval-harness-literal"] == {"entailment": "True", "not_entailment": "False"}
        elif name in ("qqp", "qqp_full", "cola"):
            assert all(tuple(words.values()) == ("No", "Yes") for words in said.values())


def test_the_harnesss_patterns_are_its_own():
    fields = {"question1": "A?", "question2": "B?", "sentence": "C.", "premise": "P", "hypothesis": "H."}
    rendered = {name: load_task(name).patterns["eval-harness"].render(fields) for name in ("qqp", "cola", "rte", "mnli_3way")}
    assert rendered == {  # lm-evaluation-harness 0.4, tasks/glue, doc_to_text
        "qqp": "Question 1: A?\nQuestion 2: B?\nQuestion: Do both questions ask the same thing?\nAnswer:",
        "cola": "C.\nQuestion: Does this sentence make sense?\nAnswer:",
        "rte": "P\nQuestion: H. True or False?\nAnswer:",
        "mnli_3way": "P\nQuestion: H. True, False or Neither?\nAnswer:",
    }


def test_a_literal_form_exists_where_a_newline_does():
    of_the_paper = [task for task in map(load_task, TASKS) if "gpt-3" in task.patterns]
    assert len(of_the_paper) > 4
    for task in of_the_paper:
        plain = {name: pattern for name, pattern in task.patterns.items() if not name.endswith("-literal")}
        assert task.patterns == with_literals(plain)


# What a scorer that always gives the same answer scores: the numbers that passed for results once.
CONSTANT = [
    ("rte", "rte", 131 / 277, "47.29%"), ("rte", "hans", 0.5, "50.00%"), ("mnli", "mnli", 3479 / 6692, "51.99%"),
    ("mnli_merged", "mnli_merged", 6336 / 9815, "64.55%"), ("mnli_3way", "mnli_3way", 3479 / 9815, "35.45%"),
    ("qqp", "paws_qqp", 486 / 677, "71.79%"), ("qqp", "paws_qqp", 191 / 677, "28.21%"),
    ("cola", "cola", 367 / 527, "69.64%"), ("cola", "cola_ood", 162 / 516, "31.40%"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "accuracy", "printed"), CONSTANT)
def test_a_constant_answer_is_named_whatever_the_task(task_data, task, name, accuracy, printed):
    labels = load_task(task).labels
    (examples,) = [test.examples for test in loaded(task, task_data).tests if test.name == name]
    gold = np.array([example.label for example in examples])
    (said,) = [label for label in range(len(labels)) if abs((gold == label).mean() - accuracy) < 1e-9][:1]
    assert_named(gold, labels, said, accuracy, printed)


@pytest.mark.parametrize(("said", "accuracy", "printed"), [(0, 0.625, "62.50%"), (1, 0.375, "37.50%")])
def test_a_constant_answer_on_the_subset_of_qqp(said, accuracy, printed):
    published = np.array([0] * 625 + [1] * 375)
    assert_named(published, load_task("qqp").labels, said, accuracy, printed)


def assert_named(gold, labels, said: int, accuracy: float, printed: str) -> None:
    metrics = of_predictions(gold, np.full(len(gold), said), names=labels)
    assert metrics.accuracy == pytest.approx(accuracy) and f"{metrics.accuracy:.2%}" == printed
    assert metrics.macro_accuracy == pytest.approx(1 / len(labels)) and metrics.mcc == 0
    found = {finding.code: finding for finding in set_findings(metrics, "set", "last")}
    assert {"constant_prediction", "chance_level"} <= found.keys() and labels[said] in found["constant_prediction"].message


def test_sources_name_each_file_once():
    for name in TASKS:
        files = [file for source in load_task(name).sources for file in source.files]
        assert len(set(files)) == len(files)
    with pytest.raises(UserError, match="is not a folder"):
        resolve_sources(load_task("rte").sources, "/no/such/folder")
