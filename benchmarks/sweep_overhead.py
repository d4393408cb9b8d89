"""What the sweep itself costs: thousands of trials that do nothing, through the same path as real ones.

    python benchmarks/sweep_overhead.py [--trials 5000] [--workers 2]

Side by side: on Ray (class trainable, workers kept, records written by the workers), a bare class trainable of Ray Tune that does
nothing and writes nothing, serially in one process, and the naive way of one new Ray actor a trial (a sample of 20). For each fifth of
the trials: trials per second, which must not fall with what has been done, the driver's own CPU time, and its resident memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from llmft.config.spec import DataRef, ModelRef
from llmft.records.record import Cost, TrialRecord
from llmft.tasks._registry import load_task
from llmft.trial.result import TrialResult
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.run import SweepOptions, run_sweep

Point = tuple[int, float, float, float]
N_SEEDS, N_POINTS, N_SEARCH_SEEDS = 10, 20, 2


class Stages:
    """Notes for every fifth of `n_trials`: trials done, trials per second, CPU ms of this process a trial, its MiB."""

    def __init__(self, n_trials: int):
        self.every, self.points = max(1, n_trials // 5), []
        self._last = 0, time.perf_counter(), time.process_time()

    def note(self, n_done: int) -> None:
        if n_done % self.every == 0:
            here = n_done, time.perf_counter(), time.process_time()
            n, wall, cpu = (now - before for now, before in zip(here, self._last, strict=True))
            self.points.append((n_done, n / wall, 1000 * cpu / n, psutil.Process().memory_info().rss / 2**20))
            self._last = here


def no_op(spec, runtime) -> TrialResult:
    """A record as of a trial that took no time."""
    score = dict.fromkeys(spec.selections, 0.5 + spec.data_seed % 7 / 100)
    record = TrialRecord(digest=spec.digest, spec=spec, status="finished", dev_score=score, dev_loss=score, cost=Cost(wall_s=0.0))
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


def measure(n_trials: int, **how) -> list[Point]:
    """(trials done, trials per second, CPU ms of the driver a trial, its MiB) for every fifth of the trials."""
    from sweeps.execution.sweep_state import SweepState

    plan, cells = make_cells(n_trials)
    stages, ended = Stages(len(cells) * (N_SEEDS + N_POINTS * N_SEARCH_SEEDS)), SweepState.ended

    def noted(self, record):
        ended(self, record)
        stages.note(self.n_new)

    SweepState.ended = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_sweep(plan, cells, Path(folder) / "r", SweepOptions(**how), console=Console(quiet=True), run_trial=partial(no_op))
            assert outcome.n_finished == len(cells) * (N_SEEDS + N_POINTS * N_SEARCH_SEEDS)
    finally:
        SweepState.ended = ended
    return stages.points


def bare_tune(n_trials: int, workers: int) -> list[Point]:
    """The same for the least that Ray Tune can do: a class trainable whose step returns at once, on workers that are kept."""
    import sweeps.ray_backend.session  # isort: skip # noqa: F401 - sets the environment of a sweep, which Ray reads

    import ray
    from ray import tune

    class Nothing(tune.Trainable):
        def step(self):
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir):
            return None

        def reset_config(self, new_config):
            return True

    class Count(tune.Callback):
        def __init__(self):
            self.stages, self.n = Stages(n_trials), 0

        def on_trial_complete(self, iteration, trials, trial, **info):
            self.n += 1
            self.stages.note(self.n)

    ray.init(address="local", num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tune.Tuner(
                Nothing,
                tune_config=tune.TuneConfig(num_samples=n_trials, reuse_actors=True, max_concurrent_trials=workers),
                run_config=tune.RunConfig(
                    name="bare",
                    storage_path=folder,
                    verbose=0,
                    callbacks=[count := Count()],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
        return count.stages.points
    finally:
        ray.shutdown()


def new_actors(n: int = 20) -> float:
    """Trials per second where each gets an actor of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:

        @ray.remote(num_cpus=1)
        class Trial:
            def run(self):
                import llmft.trial.run  # noqa: F401 - what every trial needs

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
    n, workers = arguments.trials, arguments.workers
    ways = {
        "serial": measure(n, serial=True),
        "bare Ray Tune": bare_tune(n, workers),
        "a sweep on Ray": measure(n, workers=workers),
    }
    columns = ("way", "trials done", "trials/s", "ms/trial", "driver CPU ms/trial", "driver MiB")
    table = Table(*columns, title="what a sweep costs beside its trials")
    for name, points in ways.items():
        for n_done, rate, cpu, mib in points:
            table.add_row(name, f"{n_done:,}", f"{rate:.1f}", f"{1000 / rate:.1f}", f"{cpu:.1f}", f"{mib:,.0f}")
    alone = new_actors()
    table.add_row("a new actor a trial", "20", f"{alone:.2f}", f"{1000 / alone:.0f}", "", "")
    Console(width=120).print(table)
    (ours, our_cpu), (bare, bare_cpu) = (
        (statistics.median(1 / point[1] for point in ways[name]), statistics.median(point[2] for point in ways[name]))
        for name in ("a sweep on Ray", "bare Ray Tune")
    )
    print(
        f"a sweep on Ray / bare Ray Tune: {ours / bare:.2f} of its wall time, {our_cpu / bare_cpu:.2f} of its "
        f"driver's CPU time (load {os.getloadavg()[0]:.1f})"
    )


if __name__ == "__main__":
    main()
