from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.small_models import CPU

from llmft.config.spec import ModelRef, TrialSpec
from llmft.errors import Cause, TrialFailure, UserError
from llmft.records.record import SCHEMA_VERSION, Finding, TrialRecord
from llmft.records.record_files import PREDICTIONS_FILE, RECORD_FILE, RecordError, read_record, read_records, write_record
from llmft.records.storage import write_atomically
from llmft.trial.run import run_trial

ROOT = Path(__file__).resolve().parents[3]


def record(n_shots: int = 0, **changed) -> TrialRecord:
    spec = TrialSpec(model=ModelRef(name="m"), task="toy", method="zero_shot", n_shots=n_shots)
    return TrialRecord(**{"digest": spec.digest, "spec": spec, "status": "finished"} | changed)


def test_a_real_trials_record_comes_back_whole(tmp_path, spec_of):
    for spec in (spec_of("pattern"), spec_of("in_context"), spec_of("pattern", n_shots=6000)):
        result = run_trial(spec, CPU)
        write_record(tmp_path / spec.digest, result.record, result.predictions)
        read = read_record(tmp_path / spec.digest)
        expected = result.record.model_dump() | {"predictions_sha256": read.predictions_sha256}
        assert read.model_dump() == expected
        assert read.spec == spec and read.spec.digest == read.digest == spec.digest
    assert not read.finished and read.cause is Cause.USER_ERROR


def test_the_record_names_the_checksum_of_its_predictions(tmp_path):
    write_record(tmp_path, record(), b"predictions")
    assert (tmp_path / PREDICTIONS_FILE).read_bytes() == b"predictions"
    assert read_record(tmp_path).predictions_sha256 == hashlib.sha256(b"predictions").hexdigest()


def test_the_record_is_written_after_the_predictions(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("llmft.records.record_files.write_atomically", lambda path, content: order.append(path.name))
    write_record(tmp_path, record(), b"predictions")
    assert order == [PREDICTIONS_FILE, RECORD_FILE]


def test_nothing_is_left_beside_a_written_file(tmp_path):
    write_atomically(tmp_path / "file", b"1")
    write_atomically(tmp_path / "file", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"2"


def test_a_killed_writer_leaves_a_whole_record_or_none(tmp_path):
    code = """
    import sys
    from pathlib import Path
    from llmft.records.record import TrialRecord
    from llmft.records.record_files import write_record
    record = TrialRecord.model_validate_json(Path(sys.argv[1]).read_bytes())
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        write_record(Path(sys.argv[2]), record.model_copy(update={"message": str(number) * 200_000}), b"x" * number)
    """
    (tmp_path / "template.json").write_text(record().model_dump_json())
    whole = 0
    for attempt in range(4):
        folder = tmp_path / f"trial{attempt}"
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "template.json"), str(folder)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.07 * attempt)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        if (folder / RECORD_FILE).exists():
            whole += 1
            left = read_record(folder)
            assert left.message == left.message[: len(left.message) // 200_000] * 200_000
    assert whole


def test_a_folder_without_a_record_is_a_trial_that_never_ended(tmp_path):
    (tmp_path / PREDICTIONS_FILE).write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


WHOLE = record().model_dump_json()
DAMAGED = {
    "cut": WHOLE[: len(WHOLE) // 2].encode(),
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"3",
    "another object": b"{}",
    "a version that is no number": json.dumps({**json.loads(WHOLE), "schema_version": "new"}).encode(),
    "an unknown key": json.dumps({**json.loads(WHOLE), "surprise": 1}).encode(),
    "an unknown cause": json.dumps({**json.loads(WHOLE), "cause": "bad luck"}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(RecordError, match=RECORD_FILE) as raised:
        read_record(tmp_path)
    assert "run the plan again" in str(raised.value) and "\n" not in str(raised.value)


def test_a_record_of_a_newer_schema_asks_for_an_upgrade(tmp_path):
    (tmp_path / RECORD_FILE).write_text(json.dumps({**json.loads(WHOLE), "schema_version": SCHEMA_VERSION + 1, "new": 1}))
    with pytest.raises(RecordError, match="upgrade llmft"):
        read_record(tmp_path)


def test_read_records_gives_every_record_in_the_order_of_the_folders_and_errors_in_their_place(tmp_path):
    records = [record(n) for n in range(0, 10, 2)]
    for one in reversed(records):
        write_record(tmp_path / one.digest, one)
    digests = sorted(one.digest for one in records)
    assert [one.digest for one in read_records(tmp_path)] == digests
    (tmp_path / digests[2] / RECORD_FILE).write_text("{")
    (tmp_path / digests[3] / RECORD_FILE).unlink()
    found = list(read_records(tmp_path))
    assert isinstance(found[2], RecordError) and digests[2] in str(found[2])
    assert [one.digest for i, one in enumerate(found) if i != 2] == [*digests[:2], digests[4]]
    assert list(read_records(tmp_path / "nowhere")) == []


def test_findings_and_causes_come_back_as_they_were(tmp_path):
    found = [Finding(code="few_rows", severity="note", message='"quoted"\n中', set="rte", value=0.1 + 0.2)]
    write_record(tmp_path, record(status="failed", cause=Cause.LOST, findings=found))
    read = read_record(tmp_path)
    assert read.findings == found and read.cause is Cause.LOST


@pytest.mark.parametrize("error", [UserError("plan.yaml: no"), TrialFailure(Cause.DIVERGED, "the loss was nan")], ids=type)
def test_errors_travel_between_processes(error):
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error) and str(copied) == str(error)
    assert vars(copied) == vars(error)
