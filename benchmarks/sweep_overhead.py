"""What the sweep itself costs: thousands of trials that do nothing, through the same path as real ones.

    python benchmarks/sweep_overhead.py [--trials 5000] [--workers 2]

Side by side: on Ray (class trainable, workers kept, records written by the workers), serially in one process, and the naive way of
one new Ray actor a trial (a sample of 20). For each thousand of trials: trials per second, which
must not fall with what has been done, and resident memory of the driver.

One run, on two cores that other work kept busy (ever less towards its end): serially 53 to 195 trials/s and 261 to 294 MiB; on Ray 7 to 29
trials/s and 574 to 766 MiB, which are 48 KiB for each trial that Tune keeps; a new actor for each trial 0.6 trials/s.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from llmft.record import Cost, TrialRecord
from llmft.registry import load_task
from llmft.spec import DataRef, ModelRef
from llmft.trial import TrialResult
from sweeps.cells import build_cells
from sweeps.plan import parse_plan
from sweeps.run import run_sweep

N_SEEDS, N_POINTS, N_SEARCH_SEEDS = 10, 20, 2


def no_op(spec, runtime) -> TrialResult:
    """A record as of a trial that took no time."""
    score = dict.fromkeys(spec.selections, 0.5 + spec.data_seed % 7 / 100)
    record = TrialRecord(
        digest=spec.digest, spec=spec, status="finished", dev_score=score, dev_loss=score, cost=Cost(wall_s=0.0)
    )
    return TrialResult(record)


def make_cells(n_trials: int):
    """A plan of cells with a search of 40 trials and a report of 10 each."""
    n_cells = n_trials // (N_SEEDS + N_POINTS * N_SEARCH_SEEDS)
    content = {
        "name": "overhead",
        "models": ["fake"],
        "tasks": ["toy"],
        "n_shots": [2 * i for i in range(1, n_cells + 1)],
        "methods": {"lora": None},
        "search": {"n_trials": N_POINTS, "seeds": list(range(100, 100 + N_SEARCH_SEEDS)), "round_size": 5},
        "report": {"seeds": list(range(N_SEEDS))},
    }
    plan = parse_plan(content, "overhead")
    return plan, build_cells(
        plan,
        "overhead",
        lambda name, revision: ModelRef(name=name, fingerprint=name, path="nowhere"),
        lambda task, directory: _data(task),
    )


def _data(task: str) -> DataRef:
    load_task(task)
    return DataRef(fingerprint="fake")


def measure(n_trials: int, **how) -> list[tuple[int, float, float]]:
    """(trials done, trials per second, MiB of the driver) for every thousand trials."""
    from sweeps.run import Ledger

    plan, cells = make_cells(n_trials)
    points: list[tuple[int, float, float]] = []
    last = [0, time.perf_counter()]
    ended = Ledger.ended

    def noted(self, record):
        ended(self, record)
        if self.n_new % 1000 == 0:
            now = time.perf_counter()
            points.append((self.n_new, (self.n_new - last[0]) / (now - last[1]), psutil.Process().memory_info().rss / 2**20))
            last[:] = self.n_new, now

    Ledger.ended = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_sweep(plan, cells, Path(folder) / "r", console=Console(quiet=True), run_trial=partial(no_op), **how)
            assert outcome.n_finished == len(cells) * (N_SEEDS + N_POINTS * N_SEARCH_SEEDS)
    finally:
        Ledger.ended = ended
    return points


def new_actors(n: int = 20) -> float:
    """Trials per second where each gets an actor of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:

        @ray.remote(num_cpus=1)
        class Trial:
            def run(self):
                import llmft.trial  # noqa: F401 - what every trial needs

        started = time.perf_counter()
        for _ in range(n):
            actor = Trial.remote()
            ray.get(actor.run.remote())
            ray.kill(actor)
        return n / (time.perf_counter() - started)
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    table = Table("way", "trials done", "trials/s", "driver MiB", title="what a sweep costs beside its trials")
    for name, how in (("serial", {"serial": True}), (f"Ray, {arguments.workers} workers", {"workers": arguments.workers})):
        for n_done, rate, mib in measure(arguments.trials, **how):
            table.add_row(name, f"{n_done:,}", f"{rate:.1f}", f"{mib:,.0f}")
    table.add_row("Ray, a new actor a trial", "20", f"{new_actors():.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
