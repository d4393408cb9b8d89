"""One trial inside a Ray worker. The worker keeps its process, and llmft its base model, from trial to trial."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmft.config import TrialSpec
from llmft.errors import Cause
from llmft.records import Cost, TrialRecord
from sweeps.process import gc_paused
from sweeps.ray_backend.worker_group import run_group, run_here
from sweeps.resources import ResourceRequest
from sweeps.store import Store

with gc_paused():
    from ray import tune

GRACE = 1.5
"""A trial watches its own time limit; after how many times that limit its process is ended if it hangs (5 s later at least)."""


def read_job(config: dict[str, Any]) -> dict[str, Any]:
    """The job in a Tune configuration: `job` as JSON, and `run_trial` where it is not llmft's."""
    return json.loads(config["job"]) | {"run_trial": config.get("run_trial")}


def slot_in(job: dict[str, Any]) -> ResourceRequest:
    return ResourceRequest(**job["slot"])


class TrialTrainable(tune.Trainable):
    """Runs a trial in its only step, and writes its record itself, so that no result can be lost on the way.

    `reset_config` must not work or raise: a failure there hangs or fails the sweep.
    """

    n_trials_before = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        job = read_job(self.config)
        slot = slot_in(job)
        if Store(job["root"]).get(job["digest"]) is None:
            job = {**job, "n_trials_before": self.n_trials_before}
            self.n_trials_before += 1
            with _ended_when_it_hangs(job):
                if slot.n_workers == 1:
                    run_here(job)
                else:
                    run_group(job, slot)
        return {"digest": job["digest"], "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


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
