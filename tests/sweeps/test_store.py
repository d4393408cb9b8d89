import json
import os
import subprocess
import sys

import pytest
from fakes import fake_record

from llmft.errors import Cause, UserError
from llmft.record import RECORD_FILE
from sweeps.failures import FailurePolicy
from sweeps.store import Store


@pytest.fixture
def record(small_cells):
    return fake_record(small_cells()[1][0].base)


def test_what_is_put_is_got_and_half_a_trial_does_not_count(tmp_path, record):
    store = Store(tmp_path)
    assert store.get(record.digest) is None and store.load() == {}
    folder = store.folder(record.digest)
    folder.mkdir(parents=True)
    (folder / "predictions.parquet").write_bytes(b"half")
    assert store.get(record.digest) is None and store.load() == {}
    store.put(record, b"predictions")
    assert store.get(record.digest).dev_accuracy == record.dev_accuracy and list(store.load()) == [record.digest]
    store.discard(record.digest)
    assert store.load() == {}


def test_a_damaged_record_is_said_in_one_line(tmp_path, record):
    store = Store(tmp_path)
    store.put(record)
    (store.folder(record.digest) / RECORD_FILE).write_text("{")
    for read in (store.load, lambda: store.get(record.digest)):
        with pytest.raises(UserError, match="not a readable record"):
            read()


def test_one_sweep_at_a_time_and_the_lock_dies_with_its_process(tmp_path):
    code = "import sys, time; from sweeps.store import Store\nwith Store(sys.argv[1]).locked():\n print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} "), Store(tmp_path).locked():
            pass
        other.kill()
    with Store(tmp_path).locked(), pytest.raises(UserError, match=f"process {os.getpid()} "), Store(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Store(tmp_path / "file").locked():
        pass


def test_leftovers_of_killed_writers_are_swept_up(tmp_path, record):
    store = Store(tmp_path)
    store.put(record)
    leftover = store.folder(record.digest) / ".record.json.abcd.tmp"
    leftover.write_text("half")
    with store.locked():
        assert not leftover.exists()
    assert list(store.load()) == [record.digest]


def test_the_manifest_names_the_plans_records_and_choices(tmp_path, small_cells):
    import random

    from test_schedule import finish

    from sweeps.schedule import Schedule

    plan, cells = small_cells()
    store, schedule = Store(tmp_path / "results"), Schedule(cells)
    store.root.mkdir()
    records = finish(schedule, {}, random.Random(0))
    assert store.write_plan(plan) is False and store.write_plan(plan) is False
    assert store.write_plan(plan.model_copy(update={"n_dev": 8})) is True
    store.write_manifest(plan, schedule, records)
    content = json.loads((store.root / "sweep.json").read_text())
    assert content["plan_name"] == "small" and len(content["report"]) == 10 and len(content["search"]) == 16
    assert set(content["report"]) | set(content["search"]) == set(records)
    lora = content["choices"]
    assert [choice["cell"]["method"] for choice in lora] == ["lora", "lora"]  # what trains nothing has nothing to choose
    assert [choice["n_search_trials"] for choice in lora] == [8, 8] and all(
        {"learning_rate", "r"} == set(choice["params"]) for choice in lora
    )


def test_which_failures_stand(record):
    def failed(cause):
        return record.model_copy(update={"status": "failed", "cause": cause})

    policy, again = FailurePolicy(), FailurePolicy(retry_failed=True)
    assert policy.settled(record) and again.settled(record)
    stands = {cause: policy.settled(failed(cause)) for cause in Cause}
    assert [cause for cause, settled in stands.items() if settled] == [Cause.DIVERGED, Cause.QUERY_TOO_LONG]
    assert not any(again.settled(failed(cause)) for cause in Cause)
    assert policy.wants_fresh_process(failed(Cause.OUT_OF_MEMORY), 1) and not policy.wants_fresh_process(
        failed(Cause.OUT_OF_MEMORY), 0
    )
    assert not policy.wants_fresh_process(failed(Cause.DIVERGED), 3) and not policy.wants_fresh_process(record, 3)
