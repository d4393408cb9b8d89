"""A results folder that was written before modules moved into rooms is read, resumed and reported as before."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from llmft.records.record_files import read_record, read_records
from sweeps.cli.app import _run

ARCHIVE = Path(__file__).parent / "old_results" / "before_rooms.tar.gz"


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "before_rooms"


def metrics_of(folder: Path) -> dict:
    record = json.loads((folder / "record.json").read_text())
    return {name: record[name] for name in ("spec", "status", "metrics", "dev_score", "curve", "draws")}


def test_every_record_is_read_and_keeps_its_digest(old):
    records = list(read_records(old / "trials"))
    assert len(records) == 27 and sum(record.finished for record in records) == 24
    for record in records:
        assert read_record(old / "trials" / record.digest).spec.digest == record.digest


def test_the_same_plan_runs_nothing_again(old, capsys):
    before = {path: path.read_bytes() for path in old.rglob("record.json")}
    assert _run(["sweep", str(old / "plan.yaml"), "--serial", "--out", str(old)]) == 1  # three trials diverged
    assert " 0 ran now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in old.rglob("record.json")} == before


def test_what_is_missing_runs_again_with_the_same_numbers(old, capsys):
    trials = sorted(read_records(old / "trials"), key=lambda record: record.digest)
    lost = [next(r for r in trials if r.spec.method == method and r.spec.test_sets != ()) for method in ("bitfit", "prompt_tuning")]
    lost = [record for record in lost if record.finished]
    expected = {record.digest: metrics_of(old / "trials" / record.digest) for record in lost}
    for record in lost:
        shutil.rmtree(old / "trials" / record.digest)
    assert lost and _run(["sweep", str(old / "plan.yaml"), "--serial", "--out", str(old)]) == 1
    assert f" {len(lost)} ran now" in capsys.readouterr().out
    for digest, numbers in expected.items():
        again = metrics_of(old / "trials" / digest)
        assert again["status"] == numbers["status"] and again["metrics"].keys() == numbers["metrics"].keys()
        for selection, sets in numbers["metrics"].items():
            for name, metrics in sets.items():
                assert again["metrics"][selection][name]["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.13)  # one of 8 rows


def test_the_report_gives_the_same_comparison(old, tmp_path, capsys):
    assert _run(["report", str(old)]) == 0
    expected, now = (pd.read_csv(path) for path in (tmp_path / "comparison.csv", old / "report" / "tables" / "comparison.csv"))
    pd.testing.assert_frame_equal(now, expected, check_exact=False, rtol=1e-9)


def test_kept_weights_are_exported(old, tmp_path, capsys):
    record = next(r for r in read_records(old / "trials") if r.spec.method == "prompt_tuning" and r.weights_sha256)
    assert _run(["export", str(old), record.digest, str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
