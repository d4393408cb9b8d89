"""What dies while a sweep runs, and what must hold afterwards: each trial is in the store once, as if nothing had happened."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from support.fakes import fake_data, fake_model, fake_trial
from support.runs import executed

from llmft.errors import Cause
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.run import SweepOptions, run_sweep
from sweeps.store.store import Store

pytestmark = pytest.mark.ray
DRIVER = Path(__file__).resolve().parents[2] / "support" / "cluster_driver.py"
N_TRIALS = 26
SIXTY = (("seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"), ("n_trials: 4", "n_trials: 8"))


def start(**options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), json.dumps(options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(**options) -> tuple[int, dict, str]:
    """(exit code, outcome, what was said) of a sweep in a process of its own."""
    process = start(**options)
    said, complaints = process.communicate(timeout=200)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return process.returncode, json.loads(lines[-1]) if lines else {}, complaints


def n_records(root) -> int:
    return len(list(Path(root).glob("trials/*/record.json")))


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def results(root) -> dict:
    """What a sweep found out, without times."""
    return {digest: (record.status, record.cause, record.dev_score, record.metrics) for digest, record in Store(root).load().items()}


@pytest.fixture
def undisturbed(tmp_path, plan_file):
    """Writes a plan, runs it alone in this process, and gives the plan's file and the results."""

    def run_alone(*changes):
        path = plan_file(*changes)
        plan, where = load_plan(str(path))
        cells, log = build_cells(plan, where, fake_model, fake_data), str(tmp_path / "alone.log")
        options, trial = SweepOptions(serial=True), partial(fake_trial, log=log)
        run_sweep(plan, cells, tmp_path / "alone", options, console=Console(quiet=True), run_trial=trial)
        return str(path), results(tmp_path / "alone"), (tmp_path / "alone" / "sweep.json").read_bytes()

    return run_alone


def test_a_node_is_killed_in_a_cluster_of_three(tmp_path, undisturbed):
    plan, expected, manifest = undisturbed()
    root = tmp_path / "r"
    code, outcome, said = run(plan=plan, root=str(root), nodes=[2, 2], workers=4, sleep_s=0.5, kill="node", kill_after=6)
    assert code == 0 and outcome == {"finished": N_TRIALS, "failed": 0, "new": N_TRIALS}, said
    assert results(root) == expected and (root / "sweep.json").read_bytes() == manifest
    runs = Counter(executed(tmp_path / "r.log"))
    assert set(runs) == set(expected) and sum(runs.values()) <= N_TRIALS + 2  # what ran on the node ran again
    assert "its machine was lost" in said


@pytest.mark.long  # by default test_ray compares two workers with none
@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_trial(tmp_path, undisturbed, workers):
    plan, expected, manifest = undisturbed()
    code, outcome, said = run(plan=plan, root=str(tmp_path / "r"), workers=workers)
    assert code == 0 and outcome["finished"] == N_TRIALS, said
    assert results(tmp_path / "r") == expected and (tmp_path / "r" / "sweep.json").read_bytes() == manifest


@pytest.mark.long
def test_the_head_of_the_cluster_disappears(tmp_path, undisturbed):
    plan, expected, _ = undisturbed()
    root = tmp_path / "r"
    code, _, said = run(plan=plan, root=str(root), nodes=[2], sleep_s=0.5, kill="head", kill_after=4)
    assert code == 1 and said.splitlines()[-1].startswith("llmft: Ray: the head at ") and "the same command goes on" in said
    stored = results(root)
    assert 4 <= len(stored) < N_TRIALS and stored.items() <= expected.items()
    code, outcome, _ = run(plan=plan, root=str(root))
    assert code == 0 and outcome["new"] == N_TRIALS - len(stored) and results(root) == expected


def test_a_trial_that_hangs_is_ended(tmp_path, plan_file):
    plan = plan_file(
        ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""), ("n_shots: [2, 4]", "n_shots: [2]"),
        ("r: {choices: [2, 4]}", "learning_rate: {choices: [1e-3, 1e-2]}"),
        ("{n_trials: 4, seeds: [100, 101]", "{n_trials: 2, seeds: [100]"),
        ("n_dev: 4", "n_dev: 4\ntrial_timeout_s: 1.0"),
    )  # fmt: skip
    code, outcome, said = run(plan=str(plan), root=str(tmp_path / "r"), hangs_at=5e-3)
    assert code == 0 and outcome == {"finished": 4, "failed": 1, "new": 5}, said
    (hung,) = [record for record in Store(tmp_path / "r").load().values() if not record.finished]
    assert hung.cause is Cause.TIMEOUT and hung.spec.train.learning_rate == 1e-2 and "it hung" in hung.message


@pytest.mark.long  # by default test_ray kills one, with fewer trials
@pytest.mark.parametrize("n_kills", [2, 10])
@pytest.mark.timeout(600)
def test_the_driver_is_killed_at_random_moments(tmp_path, undisturbed, n_kills):
    plan, expected, manifest = undisturbed(*SIXTY)
    root, moments = tmp_path / "r", random.Random(n_kills)
    assert len(expected) > 60
    started: list[psutil.Process] = []
    for k in range(n_kills):
        driver, at_least = start(plan=plan, root=str(root), workers=2, sleep_s=0.2), n_records(root)
        goal = len(expected) * (k + 1) // (n_kills + 1)
        wait_for(lambda goal=goal, at_least=at_least: n_records(root) >= max(goal, at_least))
        time.sleep(moments.uniform(0, 0.4))
        started += psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.communicate()
        stored = results(root)
        assert stored.items() <= expected.items()  # whatever is there is right
    code, outcome, said = run(plan=plan, root=str(root), workers=2)
    assert code == 0 and outcome["finished"] == len(expected), said
    assert results(root) == expected and (root / "sweep.json").read_bytes() == manifest
    assert not list(root.glob("trials/*/.*.tmp"))
    runs = Counter(executed(tmp_path / "r.log"))
    assert set(runs) == set(expected) and sum(runs.values()) <= len(expected) + 2 * n_kills
    points = optuna_trials(root)
    assert len(points) == len(set(points)) == 2 * 8 and {state.name for *_, state in points} == {"COMPLETE"}
    assert len(started) >= 5 * n_kills  # Ray's own processes and the workers
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def optuna_trials(root) -> list[tuple]:
    """(study, its trial's parameters, state) of every trial in the journal of studies."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(root / "studies.log")))
    return [
        (study.study_name, tuple(sorted(trial.params.items())), trial.state)
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id)
    ]
