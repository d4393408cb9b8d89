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


def read_result(folder: Path) -> dict:
    """Return a record without what a second run may change: times, memory, versions, and where the model lies."""
    record = json.loads((folder / "record.json").read_text())
    del record["cost"], record["provenance"], record["spec"]["model"]["path"]
    if record["teacher"]:
        del record["teacher"]["wall_s"]
    return record


def assert_close(now, expected, where: str = "record") -> None:
    """Compare two JSON values: floats within 1e-4, all else exactly."""
    if isinstance(expected, dict):
        assert now.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(now[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(now) == len(expected), where
        for position, value in enumerate(expected):
            assert_close(now[position], value, f"{where}[{position}]")
    else:
        assert now == (pytest.approx(expected, rel=1e-4, abs=1e-4) if isinstance(expected, float) else expected), where


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
    finished = [record for record in read_records(old / "trials") if record.finished and record.weights_sha256]
    lost = {next(r.digest for r in finished if r.spec.method == method) for method in ("bitfit", "prompt_tuning")}
    expected = {digest: read_result(old / "trials" / digest) for digest in lost}
    kept = {path: path.read_bytes() for path in old.rglob("record.json") if path.parent.name not in lost}
    for digest in lost:
        shutil.rmtree(old / "trials" / digest)
    assert _run(["sweep", str(old / "plan.yaml"), "--serial", "--out", str(old)]) == 1  # three trials diverged
    assert " 2 ran now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in old.rglob("record.json") if path.parent.name not in lost} == kept
    for digest, result in expected.items():
        again = read_result(old / "trials" / digest)
        for name in ("predictions_sha256", "weights_sha256"):  # the last bits of floats may differ between processors
            assert again.pop(name) and result.pop(name)
        assert_close(again, result)


def test_the_report_gives_the_same_comparison(old, tmp_path, capsys):
    assert _run(["report", str(old)]) == 0
    expected, now = (pd.read_csv(path) for path in (tmp_path / "comparison.csv", old / "report" / "tables" / "comparison.csv"))
    pd.testing.assert_frame_equal(now, expected, check_exact=False, rtol=1e-9)


def test_kept_weights_are_exported(old, tmp_path, capsys):
    record = next(r for r in read_records(old / "trials") if r.spec.method == "prompt_tuning" and r.weights_sha256)
    assert _run(["export", str(old), record.digest, str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
