import json
import os
import subprocess
from functools import partial

import pytest
from rich.console import Console
from support.fakes import fake_record

import analysis
from llmft.errors import Cause, UserError
from llmft.records.record import Cost
from llmft.records.record_files import RECORD_FILE
from llmft.trial.result import TrialResult
from sweeps.ray_backend.losses import wants_fresh_process
from sweeps.run import SweepOptions, run_sweep
from sweeps.search.retry_policy import FailurePolicy
from sweeps.search.study_mirror import JOURNAL_FILE
from sweeps.store.store import Store, StoreUnwritable


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
    assert store.get(record.digest).dev_score == record.dev_score and list(store.load()) == [record.digest]
    store.discard(record.digest)
    assert store.load() == {}


def test_a_damaged_record_is_said_in_one_line(tmp_path, record):
    store = Store(tmp_path)
    store.put(record)
    (store.folder(record.digest) / RECORD_FILE).write_text("{")
    for read in (store.load, lambda: store.get(record.digest)):
        with pytest.raises(UserError, match="not a readable record"):
            read()


def test_a_file_is_no_place_for_results(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt: is a file, and results need a folder. Choose another place with --out"):
        Store(tmp_path / "notes.txt").load()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Store(tmp_path / "file").locked():
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB: its folder, and a function that remounts it, `ro` or `rw`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*arguments):
        return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)

    try:
        mounted = mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder, lambda mode: mount("-o", f"remount,{mode}").check_returncode()
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder):
    with pytest.raises(OSError, match="No space left"), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def _contents(store):
    files = (path for path in store.root.rglob("*") if path.is_file() and path.name not in (".lock", JOURNAL_FILE))
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files}


@pytest.mark.parametrize("n_bytes_free", [0, 16 * 1024])  # no room for anything; room for the predictions, not for the record
def test_a_full_disk_leaves_nothing_half_written(small_disk, record, n_bytes_free):
    folder, _ = small_disk
    store = Store(folder / "results")
    first, second = record, record.model_copy(update={"digest": "second", "message": "x" * 20_000})
    store.put(first, b"predictions")
    before = _contents(store)
    _fill(folder)
    os.truncate(folder / "ballast", (folder / "ballast").stat().st_size - n_bytes_free)
    with pytest.raises(StoreUnwritable, match=r"results can no longer be written \(No space left on device\)") as raised:
        store.put(second, b"p" * 8000)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert _contents(store) == before and list(store.load()) == [first.digest] and store.get("second") is None
    assert set(analysis.load(store.root)["status"]) == {"finished"}
    (folder / "ballast").unlink()
    store.put(second, b"p" * 8000)
    assert set(store.load()) == {first.digest, "second"}


def test_a_folder_that_turns_read_only_keeps_what_it_holds(small_disk, record):
    folder, remount = small_disk
    store = Store(folder / "results")
    store.put(record, b"predictions")
    before = _contents(store)
    remount("ro")
    with pytest.raises(StoreUnwritable, match="no longer be written .Read-only file system"):
        store.put(record.model_copy(update={"digest": "second"}), b"predictions")
    with pytest.raises(StoreUnwritable, match="no longer be written .Read-only file system"):
        store.discard(record.digest)
    with pytest.raises(UserError, match="results cannot be written here .Read-only file system"), store.locked():
        pass
    with pytest.raises(UserError, match="the report cannot be written .Read-only file system"):
        analysis.write_report(store.root)
    assert _contents(store) == before and list(store.load()) == [record.digest]
    remount("rw")
    with store.locked():
        store.put(record.model_copy(update={"digest": "second"}), b"predictions")
    assert len(store.load()) == 2


def test_a_sweep_whose_disk_fills_up_stops_and_goes_on_where_there_is_room(small_disk, small_cells, tmp_path):
    folder, _ = small_disk
    plan, cells = small_cells()
    trials = []

    def run_trial(spec, runtime, fills=False):
        trials.append(spec.digest)
        if fills and len(trials) == 6:
            _fill(folder)
        return TrialResult(fake_record(spec), b"p" * 1000)

    serially = SweepOptions(serial=True)
    run = partial(run_sweep, plan, cells, options=serially, console=Console(quiet=True))
    with pytest.raises(StoreUnwritable, match="No space left on device"):
        run(folder / "results", run_trial=partial(run_trial, fills=True))
    assert len(Store(folder / "results").load()) == 5
    (folder / "ballast").unlink()
    outcome = run(folder / "results", run_trial=run_trial)
    assert (outcome.n_finished, outcome.n_failed, outcome.n_new) == (26, 0, 21) and len(trials) == 27
    run(tmp_path / "never_full", run_trial=run_trial)
    assert _contents(Store(folder / "results")) == _contents(Store(tmp_path / "never_full"))


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

    from support.schedules import finish

    from sweeps.search.schedule import Schedule

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
    assert [digest for cell in content["cells"] for digest in cell["report"]] == content["report"]
    store.write_manifest(plan, schedule, {})  # the plan is known before anything has run, but not what the searches will choose
    cells = [
        (cell["cell"]["method"], cell["n_report"], len(cell["report"]))
        for cell in json.loads((store.root / "sweep.json").read_text())["cells"]
    ]
    assert cells == [("zero_shot", 1, 1), ("in_context", 3, 3), ("lora", 3, 0), ("lora", 3, 0)]
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
    assert [cause for cause, settled in stands.items() if settled] == [Cause.DIVERGED, Cause.QUERY_TOO_LONG, Cause.PRUNED]
    assert [cause for cause in Cause if again.settled(failed(cause))] == [Cause.PRUNED]  # that one is the schedule's affair
    slow = failed(Cause.TIMEOUT).model_copy(update={"cost": Cost(wall_s=20.0)})
    assert FailurePolicy(timeout_s=15).settled(slow) and not FailurePolicy(timeout_s=60).settled(slow)
    assert wants_fresh_process(failed(Cause.OUT_OF_MEMORY), 1) and not wants_fresh_process(failed(Cause.OUT_OF_MEMORY), 0)
    assert not wants_fresh_process(failed(Cause.DIVERGED), 3) and not wants_fresh_process(record, 3)
