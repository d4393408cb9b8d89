"""Trials that take several workers, among others that take one: all end, and nothing that was reserved for them is left behind."""

import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from support.fakes import fake_data, fake_model, fake_trial
from support.runs import executed

from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.run import run_sweep
from sweeps.store.store import Store

pytestmark = pytest.mark.ray
MIXED = (  # two trials of one worker, two of two
    ("models: [fake]", "models: [{name: large, workers: 2, parallel: ddp}, small]"),
    ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""),
    ("n_shots: [2, 4]", "n_shots: [2]"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1]"),
    ("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null"),
)


def trial_that_loses_its_driver(spec, runtime, log):
    """As `fake_trial`; the first of several workers kills the process that started them, once."""
    with open(f"{log}.workers", "a") as file:
        file.write(f"{spec.model.name} {runtime.world_size}\n")
    if runtime.world_size > 1 and runtime.rank == 0 and not Path(f"{log}.killed").exists():
        Path(f"{log}.killed").touch()
        for process in psutil.Process(os.getppid()).children():  # of this node's raylet
            if "Trainable" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
        time.sleep(60)
    return fake_trial(spec, runtime, log=log)


@pytest.mark.timeout(600)
@pytest.mark.long
def test_groups_and_single_workers_share_a_machine(tmp_path, plan_file):
    import ray

    from sweeps.ray_backend.session import ray_session

    plan, where = load_plan(str(plan_file(*MIXED)))
    cells, log = build_cells(plan, where, fake_model, fake_data), str(tmp_path / "log")
    with ray_session(None, n_cpus=2, groups=True):
        outcome = run_sweep(
            plan, cells, tmp_path / "r", console=Console(quiet=True), run_trial=partial(trial_that_loses_its_driver, log=log)
        )
        deadline = time.monotonic() + 60
        while left := [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    assert (outcome.n_finished, outcome.n_failed) == (4, 0) and Path(f"{log}.killed").exists()
    ran = Counter(Path(f"{log}.workers").read_text().splitlines())
    assert ran == {"small 1": 2, "large 2": 6}  # two workers each, for two trials and one more go
    assert set(executed(log)) == set(Store(tmp_path / "r").load())
