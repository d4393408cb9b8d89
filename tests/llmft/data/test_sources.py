from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from llmft.config.spec import DataRef
from llmft.data.sources import Source, resolve_sources
from llmft.errors import UserError
from llmft.tasks._registry import load_task

ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"sentence": 'say "it", twice', "label": 0}, {"sentence": "l'été\tchaud 中", "label": 1}]
FILES = ("rte_train.parquet", "rte_validation.parquet", "hans_regenerated.parquet")


def source(*files: str) -> Source:
    return Source(files, ("owner/name", "config", "train", "0123"))


def write(path: Path, rows=ROWS) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    write(tmp_path / name)
    label = str if name in ("a.csv", "a.tsv") else int  # in a text file everything is text
    assert source(name).rows(DataRef(directory=str(tmp_path))) == [row | {"label": label(row["label"])} for row in ROWS]


def test_the_first_of_several_names_is_taken(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[:1])
    assert source("a.jsonl", "b.jsonl").rows(DataRef(directory=str(tmp_path))) == ROWS[:1]
    write(tmp_path / "a.jsonl", ROWS[1:])
    assert source("a.jsonl", "b.jsonl").rows(DataRef(directory=str(tmp_path))) == ROWS[1:]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"PAR1 and nothing more"), ("a.parquet", b""), ("a.jsonl", b'{"sentence": '), ("a.csv", b"a,b\n1,2,3\n"),
     ("a.csv", b"")],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="fetch it again") as raised:
        source(name).rows(DataRef(directory=str(tmp_path)))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_a_cut_parquet_file_is_named(tmp_path):
    write(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.parquet: cannot be read"):
        source("a.parquet").rows(DataRef(directory=str(tmp_path)))


def test_a_missing_file_is_named_with_what_may_stand_for_it(tmp_path):
    with pytest.raises(UserError, match="holds none of a.parquet, b.csv"):
        source("a.parquet", "b.csv").rows(DataRef(directory=str(tmp_path)))
    with pytest.raises(UserError, match="is not a folder"):
        source("a.parquet").rows(DataRef(directory=str(tmp_path / "nowhere")))


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
    write(tmp_path / "x" / "a.jsonl")
    write(tmp_path / "y" / "a.jsonl")
    write(tmp_path / "z" / "a.jsonl", ROWS[::-1])
    x, y, z = (resolve_sources([source("a.jsonl")], str(tmp_path / name)).fingerprint for name in "xyz")
    assert x == y != z


@pytest.fixture
def copied(tmp_path, data_dir) -> Path:
    for name in FILES:
        shutil.copy(Path(data_dir) / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def change(path: Path, edit) -> None:
    rows = parquet.read_table(path).to_pylist()
    edit(rows)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def load(folder: Path):
    return load_task("rte").load(DataRef(directory=str(folder)))


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [("rte_train.parquet", lambda rows: rows[7].update(label=2), "rte_train, row 8: label 2 is not one of the task's labels 0 to 1"),
     ("rte_validation.parquet", lambda rows: rows[3].update(label=-1), "rte_validation, row 4: label -1"),
     ("rte_validation.parquet", lambda rows: rows[3].update(label=None), "rte_validation, row 4: label None"),
     ("rte_train.parquet", lambda rows: [row.pop("sentence2") for row in rows], "row 1: column 'sentence2' is missing"),
     ("rte_train.parquet", lambda rows: rows[5].update(sentence1=None), "row 6: column 'sentence1' is missing or holds no text"),
     ("rte_train.parquet", lambda rows: [row.pop("label") for row in rows], "row 1: label None"),
     ("hans_regenerated.parquet", lambda rows: rows[9].update(heuristic="luck"), "hans, row 10: heuristic 'luck'"),
     ("hans_regenerated.parquet", lambda rows: [row.pop("subcase") for row in rows], "row 1: column 'subcase' is missing")],
)  # fmt: skip
def test_a_wrong_row_is_named(copied, name, edit, said):
    change(copied / name, edit)
    with pytest.raises(UserError) as raised:
        load(copied)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_another_content_is_another_fingerprint_and_another_place_is_not(copied, data_dir):
    task = load_task("rte")
    original = task.resolve_data(data_dir).fingerprint
    assert task.resolve_data(str(copied)).fingerprint == original
    change(copied / FILES[2], lambda rows: rows[0].update(label=1 - rows[0]["label"]))
    assert task.resolve_data(str(copied)).fingerprint != original


def test_the_data_sets_have_their_published_sizes(rte):
    data = load_task("rte").load(rte)
    assert Counter(example.label for example in data.pool) == {0: 1249, 1: 1241}
    tests = {test.name: test for test in data.tests}
    assert {name: test.domain for name, test in tests.items()} == {
        "rte": "in", "hans": "out", "hans_subsequence": "out", "hans_constituent": "out"
    }  # fmt: skip
    assert Counter(example.label for example in tests["rte"].examples) == {0: 146, 1: 131}
    for name, heuristic in (
        ("hans", "lexical_overlap"),
        ("hans_subsequence", "subsequence"),
        ("hans_constituent", "constituent"),
    ):
        examples = tests[name].examples
        assert Counter(example.label for example in examples) == {0: 5000, 1: 5000}
        assert {example.groups["heuristic"] for example in examples} == {heuristic}
        assert set(Counter(example.groups["subcase"] for example in examples).values()) == {1000}
    ids = [example.id for test in data.tests for example in test.examples] + [example.id for example in data.pool]
    assert len(set(ids)) == len(ids) == 2490 + 277 + 30_000


def test_the_authors_text_file_gives_the_same_examples(copied):
    expected = load(copied)
    rows = parquet.read_table(copied / FILES[2]).to_pylist()
    head = ["gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "pairID", "heuristic", "subcase", "template"]
    lines = ["\t".join(head)]
    for i, row in enumerate(rows):
        label = ("entailment", "non-entailment")[row["label"]]
        lines.append(
            "\t".join([label, '( The ( "x" ) )', row["premise"], row["hypothesis"], f"ex{i}", row["heuristic"], row["subcase"], "t"])
        )
    (copied / "heuristics_evaluation_set.txt").write_text("\n".join(lines) + "\n")
    (copied / FILES[2]).unlink()
    assert load(copied).tests == expected.tests


OFFLINE = """
    from llmft.errors import UserError
    from llmft.tasks._registry import load_task
    from llmft.config.spec import DataRef
    try:
        load_task("rte").load(DataRef())
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "unreachable"])
def test_a_hub_out_of_reach_is_told_at_once_in_one_line(tmp_path, environment):
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE" and "proxy" not in name.lower()}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OFFLINE)],
        env=kept | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "data: cannot get nyu-mll/glue" in done.stdout and "--data-dir" in done.stdout and done.stdout.count("\n") == 1
    assert "Retrying" not in done.stderr
    assert time.monotonic() - began < 15  # two of them are imports; the hub's client alone would retry for 23


def test_all_the_data_sets_that_cannot_be_had_are_named(new_cache, server):
    new_cache()
    server.stop()
    with pytest.raises(UserError, match=r"cannot get jhu-cogsci/hans, .* Nor can nyu-mll/glue \(main\) be had\.$") as raised:
        load_task("rte").resolve_data(None)
    assert "\n" not in str(raised.value)
