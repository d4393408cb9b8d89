"""A trial that takes no time, for tests whose subject is not the training."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from llmft.config.spec import DataRef, ModelRef, TrialSpec
from llmft.errors import Cause
from llmft.records.record import Cost, CurvePoint, TrialRecord
from llmft.tasks._registry import load_task
from llmft.trial.result import TrialResult


def fake_model(name: str, revision: str = "main") -> ModelRef:
    return ModelRef(name=name, revision=revision, fingerprint=f"fake:{name}", path="nowhere")


def fake_data(task: str, directory: str | None) -> DataRef:
    load_task(task)
    return DataRef(fingerprint="fake")


def fake_record(spec: TrialSpec, cause: Cause | None = None) -> TrialRecord:
    """A record whose dev accuracy is best at a learning rate of 1e-3, and differs a little by seed."""
    if cause:
        return TrialRecord(digest=spec.digest, spec=spec, status="failed", cause=cause, message="as planned")
    distance = abs(math.log10(spec.train.learning_rate) + 3)
    dev = {name: round(0.9 - 0.1 * distance + 0.001 * (spec.data_seed % 7), 4) for name in spec.selections}
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="finished",
        dev_score=dev,
        dev_loss=dict.fromkeys(dev, distance),
        cost=Cost(wall_s=0.1),
    )


def fake_trial(
    spec: TrialSpec,
    runtime,
    log: str,
    sleep_s: float = 0.0,
    dies_at: float = math.inf,
    dies_once: bool = False,
    oom_in_used: bool = False,
    hangs_at: float = math.inf,
):
    """Log the trial, wait, and give its record; the process kills itself, or hangs, where the learning rate is above a bound."""
    first = spec.digest not in (Path(log).read_text() if Path(log).exists() else "")
    used = f"used {os.getpid()}" in (Path(log).read_text() if Path(log).exists() else "")
    with open(log, "a") as file:
        file.write(f"{spec.digest} used {os.getpid()}\n")
    runtime.report({"dev_score": 0.5})
    time.sleep(sleep_s)
    while spec.train.learning_rate > hangs_at:
        time.sleep(1)
    if spec.train.learning_rate > dies_at and (first or not dies_once):
        os.kill(os.getpid(), signal.SIGKILL)
    cause = Cause.OUT_OF_MEMORY if oom_in_used and used else None
    return TrialResult(fake_record(spec, cause), predictions=b"parquet")


def fake_curve(spec: TrialSpec) -> dict[int, float]:
    """epoch -> dev accuracy: rises to what `fake_record` gives, a little uneven, and never the same at two rates."""
    top = fake_record(spec).dev_score[spec.selections[0]]
    noise = random.Random(f"{spec.train.learning_rate} {spec.train.epochs} {spec.data_seed}")
    every, last = spec.train.eval_every_epochs, spec.train.epochs
    looks = sorted({*range(every, last + 1, every), last})
    return {epoch: round(0.5 + (top - 0.5) * (1 - 0.8**epoch) + noise.uniform(-0.02, 0.02), 4) for epoch in looks}


def fake_training(spec: TrialSpec, stop_below: Mapping[int, float]) -> TrialRecord:
    """The record of a trial with that curve, given up as `llmft.runtime.Runtime.stop_below` says."""
    curve, best = [], -math.inf
    for epoch, accuracy in fake_curve(spec).items():
        best = max(best, accuracy)
        curve.append(CurvePoint(step=epoch, epoch=epoch, train_loss=1.0, learning_rate=1e-3, dev_score=accuracy))
        if best < stop_below.get(epoch, -math.inf):
            given = {"stop_below": {str(at): floor for at, floor in stop_below.items()}}
            return fake_record(spec, Cause.PRUNED).model_copy(update={"curve": curve, "provenance": given})
    dev = dict.fromkeys(spec.selections, best)
    return fake_record(spec).model_copy(update={"curve": curve, "dev_score": dev})
