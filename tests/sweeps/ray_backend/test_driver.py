"""On a real local Ray: the same trials as without, workers that die, a driver that is killed or stopped."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from support.fakes import fake_trial
from support.runs import executed

from llmft.errors import Cause, UserError
from sweeps.run import SweepOptions, run_sweep
from sweeps.search.retry_policy import FailurePolicy, Loss
from sweeps.store.store import Store

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)
LORA_ONLY = ("  zero_shot:\n  in_context: {n_shots: [2]}\n", "")
TWO_POINTS = (  # one cell, whose search is 1e-3 and 1e-2; three trials are reported
    LORA_ONLY,
    ("n_shots: [2, 4]", "n_shots: [2]"),
    ("r: {choices: [2, 4]}", "learning_rate: {choices: [1e-3, 1e-2]}"),
    ("{n_trials: 4, seeds: [100, 101]", "{n_trials: 2, seeds: [100]"),
)


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """One Ray with two workers for every test here that needs one in this process."""
    from sweeps.ray_backend import session

    with session.ray_session(None, n_cpus=2):
        yield


@pytest.fixture
def on_ray(tmp_path, small_cells, local_ray):
    def run(*changes, name, policy=None, **fake):
        plan, cells = small_cells(*changes)
        log = tmp_path / f"{name}.log"
        outcome = run_sweep(plan, cells, tmp_path / name, policy=policy, console=QUIET, run_trial=partial(fake_trial, log=str(log), **fake))
        return outcome, executed(log), Store(tmp_path / name).load()

    return run


def test_real_trials_are_the_same_with_and_without_ray(tmp_path, plan_file, tiny_model, local_ray):
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan

    plan, where = load_plan(str(plan_file(("n_trials: 4", "n_trials: 2"), ("seeds: [0, 1, 2]", "seeds: [0, 1]"), model=tiny_model)))
    cells = build_cells(plan, where)
    outcomes = [run_sweep(plan, cells, tmp_path / name, SweepOptions(serial=name == "serial"), console=QUIET) for name in ("ray", "serial")]
    assert [(outcome.n_finished, outcome.n_failed) for outcome in outcomes] == [(15, 0), (15, 0)]
    on_ray, alone = (Store(tmp_path / name).load() for name in ("ray", "serial"))
    assert on_ray.keys() == alone.keys()
    for digest, record in on_ray.items():
        has_predictions = (Store(tmp_path / "ray").folder(digest) / "predictions.parquet").exists()
        assert has_predictions == (record.spec.test_sets != ())  # a search trial scores dev alone
        assert record.dev_score == alone[digest].dev_score and record.draws == alone[digest].draws
        for selection, sets in record.metrics.items():
            for name, numbers in sets.items():
                assert numbers.accuracy == alone[digest].metrics[selection][name].accuracy
                assert numbers.loss == pytest.approx(alone[digest].metrics[selection][name].loss, abs=1e-5)
    assert (tmp_path / "ray" / "sweep.json").read_bytes() == (tmp_path / "serial" / "sweep.json").read_bytes()


def test_a_worker_that_dies_once_costs_nothing_but_time(on_ray):
    outcome, log, records = on_ray(*TWO_POINTS, name="once", dies_at=5e-3, dies_once=True)
    assert outcome.n_failed == 0 and set(log) == set(records)
    died = [digest for digest, n in Counter(log).items() if n > 1]
    assert died and all(records[digest].spec.train.learning_rate == 1e-2 for digest in died)


def test_a_trial_whose_worker_always_dies_is_a_row(on_ray):
    outcome, log, records = on_ray(*TWO_POINTS, name="always", policy=FailurePolicy(budget={Loss.PROCESS: 1}), dies_at=5e-3)
    (lost,) = [record for record in records.values() if not record.finished]
    assert outcome.n_failed == 1 and lost.cause is Cause.LOST and lost.spec.train.learning_rate == 1e-2 and "died" in lost.message
    assert Counter(log)[lost.digest] == 2  # started again once
    assert all(record.spec.train.learning_rate == 1e-3 for record in records.values() if record.finished)  # the dead point was not chosen


def test_running_out_of_memory_in_a_used_process_is_tried_in_a_fresh_one(on_ray):
    outcome, log, records = on_ray(*TWO_POINTS, name="memory", oom_in_used=True)
    assert outcome.n_failed == 0 and len(log) > len(records) == 5


def test_the_sweep_stops_where_every_worker_dies(on_ray):
    with pytest.raises(UserError, match="4 trials in a row lost their process"):
        on_ray(LORA_ONLY, name="dead", policy=FailurePolicy(budget={Loss.PROCESS: 0}), dies_at=0)


def test_only_abandoned_scratch_folders_are_removed(tmp_path):
    from sweeps.ray_backend.scratch import SCRATCH_LOCK, SCRATCH_PREFIX, scratch_folder

    abandoned, results = tmp_path / f"{SCRATCH_PREFIX}dead", tmp_path / f"{SCRATCH_PREFIX}results"
    abandoned.mkdir()
    (abandoned / SCRATCH_LOCK).touch()
    results.mkdir()  # someone's own folder, which only has such a name
    with scratch_folder(tmp_path) as alive:
        assert not abandoned.exists() and results.exists()
        with scratch_folder(tmp_path):
            assert alive.exists()
    assert not alive.exists() and results.exists()


DRIVER = """
import sys
from functools import partial
from support.fakes import fake_data, fake_model, fake_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.search.retry_policy import FailurePolicy, Loss
from sweeps.run import SweepOptions, run_sweep

plan, where = load_plan(sys.argv[1])
cells = build_cells(plan, where, fake_model, fake_data)
try:
    run_sweep(plan, cells, sys.argv[2], SweepOptions(workers=2), run_trial=partial(fake_trial, log=sys.argv[3], sleep_s=0.3))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_killed_driver_loses_and_doubles_nothing(tmp_path, plan_file):
    plan, results, log = plan_file(), tmp_path / "results", tmp_path / "log"

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(plan), str(results), str(log)], stderr=subprocess.DEVNULL, start_new_session=True
        )

    def wait_for(n_records):
        deadline = time.monotonic() + 120
        while len(list(results.glob("trials/*/record.json"))) < n_records:
            assert time.monotonic() < deadline, "the driver made no progress"
            time.sleep(0.05)

    driver = start()
    wait_for(6)
    driver.kill()
    driver.wait()
    assert 6 <= len(Store(results).load()) < 26
    driver = start()  # at once: what is left of the killed one must not be in the way
    wait_for(14)
    os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C does: to the driver and to all that it started
    assert driver.wait(30) == 130
    assert not any(_is_scratch_of(path, driver.pid) for path in Path("/tmp").glob("llmft-ray-*"))
    driver = start()
    wait_for(20)
    driver.terminate()  # as a scheduler does: the driver alone
    assert driver.wait(30) == 130
    assert start().wait(120) == 0
    records, runs = Store(results).load(), Counter(executed(log))
    assert len(records) == 26 and set(runs) == set(records) and all(record.finished for record in records.values())
    assert sum(runs.values()) <= 26 + 3 * 2  # at most what was running at each interruption ran twice
    assert not list(results.glob("trials/*/.*.tmp"))


def _is_scratch_of(path, pid):
    return any(str(pid) in name for name in os.listdir(path / "ray")) if (path / "ray").exists() else False
