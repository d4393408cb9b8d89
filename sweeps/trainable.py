"""One trial inside a Ray worker. The worker keeps its process, and llmft its base model, from trial to trial."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune

from llmft.errors import Cause
from llmft.record import Cost, TrialRecord
from llmft.spec import TrialSpec
from sweeps.failures import FreshProcessWanted, wants_fresh_process
from sweeps.store import Store

GRACE = 1.5
"""A trial watches its own time limit; after how many times that limit its process is ended if it hangs (5 s later at least)."""


class TrialTrainable(tune.Trainable):
    """Runs a trial in its only step, and writes its record itself, so that no result can be lost on the way.

    `setup` and `reset_config` must not work or raise: a failure there hangs or fails the sweep.
    """

    n_trials_before = 0

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        job, store = self.job, Store(self.job["root"])
        if store.get(job["digest"]) is None:
            before, self.n_trials_before = self.n_trials_before, self.n_trials_before + 1
            with _ended_when_it_hangs(job):
                _run({**job, "n_trials_before": before})
        return {"digest": job["digest"], "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


def _run(job: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _train_loop,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(num_workers=0),  # local mode: in this process, without a worker group
        run_config=ray.train.RunConfig(name=job["digest"], storage_path=job["scratch"]),
    ).fit()


def _train_loop(job: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.torch import get_device

    from llmft.runtime import Runtime

    run_trial = job["run_trial"]
    if run_trial is None:
        from llmft.trial import run_trial
    torch.set_num_threads(job["n_threads"])
    context = ray.train.get_context()
    runtime = Runtime(
        device=str(get_device()), rank=context.get_world_rank(), world_size=context.get_world_size(), report=ray.train.report
    )
    result = run_trial(TrialSpec.model_validate_json(job["spec"]), runtime)
    if wants_fresh_process(result.record, job["n_trials_before"]):
        raise FreshProcessWanted(f"{result.record.cause}: {result.record.message}")
    Store(job["root"]).put(result.record, result.predictions)


@contextmanager
def _ended_when_it_hangs(job: dict[str, Any]) -> Iterator[None]:
    """Within: a trial that is far beyond its time limit gets its record from outside, and its process is ended."""
    limit = job["timeout_s"]
    if limit is None:
        yield
        return
    last = max(limit + 5.0, limit * GRACE)

    def end() -> None:
        spec = TrialSpec.model_validate_json(job["spec"])
        Store(job["root"]).put(
            TrialRecord(
                digest=spec.digest, spec=spec, status="failed", cause=Cause.TIMEOUT, cost=Cost(wall_s=last),
                message=f"it hung: its process was ended after {last:g} s, its time limit is {limit:g} s.",
            )
        )  # fmt: skip
        os._exit(1)

    watch = threading.Timer(last, end)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
