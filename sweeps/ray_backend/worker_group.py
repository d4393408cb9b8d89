"""What runs inside Ray Train: one process's part of a trial, and the group of processes that a large trial takes."""

from __future__ import annotations

import os
import time
import uuid
from functools import cache
from typing import TYPE_CHECKING, Any

from llmft.config import TrialSpec
from llmft.errors import Cause, OutOfMemory, TrialFailure
from llmft.records import Cost, TrialRecord
from sweeps.process import gc_paused, own_this_process
from sweeps.ray_backend.losses import FreshProcessWanted, wants_fresh_process
from sweeps.resources import ResourceRequest
from sweeps.store import Store

if TYPE_CHECKING:
    from llmft.runtime import Runtime


N_STARTS = 10
"""How often Ray waits for a group's resources (a minute each time) before the trial counts as lost."""


@cache
def import_for_trials() -> None:
    """Import what the first trial of a worker would import while it runs.

    Once a process: objects that later trials leave behind must stay visible to the garbage collector.
    """
    own_this_process()
    with gc_paused():
        import ray.train.torch  # noqa: F401
        import sklearn.metrics  # noqa: F401

        import llmft.trial  # noqa: F401


def train_loop(job: dict[str, Any]) -> None:
    """Run a trial as the calling process's part, and write its record: what `ray.train.torch.TorchTrainer` calls in each worker.

    Args:
        job: `root`, `digest`, `spec` (JSON), `slot` (fields of `ResourceRequest`), `n_threads`, `run_trial` (None: llmft's),
            `n_trials_before`, `folder` (the driver's working directory, on one machine); for a group `strategy` ("ddp" or "fsdp"); and
            as for `llmft.runtime.Runtime`, where not absent or None: `timeout_s`, `stop_below`, `keep_weights`, `micro_batch_tokens`,
            `n_out_of_memory`.

    Raises:
        FreshProcessWanted: what failed may have been the fault of earlier trials in this process.
        TrialFailure: one process of a group failed alone.
    """
    if job.get("folder"):  # Ray's workers start in Ray's own folder
        os.chdir(job["folder"])
    run_trial = job["run_trial"]
    if run_trial is None:
        import_for_trials()
        from llmft.trial import run_trial
    import torch

    torch.set_num_threads(job["n_threads"])
    if torch.cuda.is_available() and 0 < job["slot"]["gpus"] < 1:  # a trial beyond its share fails alone, not its neighbours
        torch.cuda.set_per_process_memory_fraction(job["slot"]["gpus"])
    runtime = _runtime(job)
    result = run_trial(TrialSpec.model_validate_json(job["spec"]), runtime)
    if wants_fresh_process(result.record, job["n_trials_before"]):
        raise FreshProcessWanted(f"{result.record.cause}: {result.record.message}")
    if runtime.rank == 0:
        Store(job["root"]).put(result.record, result.predictions, result.weights, result.responses)


def run_here(job: dict[str, Any]) -> None:
    """Run a trial in the calling process: Ray Train's local mode, without a worker group.

    Args:
        job: as for `train_loop`, and `scratch`, a folder for what Ray writes.
    """
    if job["run_trial"] is None:
        import_for_trials()
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name=job["digest"], storage_path=job["scratch"]),
    ).fit()


def _runtime(job: dict[str, Any]) -> Runtime:
    import ray.train
    from ray.train.torch import get_device

    from llmft.models import distributed_runtime
    from llmft.runtime import Runtime

    given = ("timeout_s", "keep_weights", "micro_batch_tokens", "n_out_of_memory")
    settings = {name: job[name] for name in given if job.get(name) is not None}
    settings["stop_below"] = {int(epoch): floor for epoch, floor in (job.get("stop_below") or {}).items()}
    settings |= {"device": str(get_device()), "report": ray.train.report}
    if ray.train.get_context().get_world_size() == 1:
        return Runtime(**settings)
    return distributed_runtime(job["strategy"], **settings)


def run_group(job: dict[str, Any], slot: ResourceRequest) -> None:
    """Run a trial as a group of processes, until it has a record.

    A group that runs out of memory is started again with smaller forward passes; any other fault of the trial's becomes a failed
    record.

    Args:
        job: as for `train_loop`, and `scratch`, a folder that every node sees.

    Raises:
        ray.train.TrainingFailedError: a process or node was lost, or the group did not start; the trial may be run again.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    store, began, n_out_of_memory = Store(job["root"]), time.monotonic(), 0
    job = {**job, "n_trials_before": 0}
    timeout_s = job.get("timeout_s")
    while True:
        try:
            TorchTrainer(
                train_loop,
                train_loop_config=job,
                scaling_config=ray.train.ScalingConfig(
                    num_workers=slot.n_workers,
                    use_gpu=slot.gpus > 0,
                    resources_per_worker={"CPU": slot.cpus} | ({"GPU": slot.gpus} if slot.gpus else {}),
                ),
                run_config=ray.train.RunConfig(
                    name=f"{job['digest']}-{uuid.uuid4().hex[:8]}",  # a name that was used before is taken up where it ended
                    storage_path=job["scratch"],
                    failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=N_STARTS),  # type: ignore[call-arg]  # stubs of Train v1
                ),
            ).fit()
            return
        except ray.train.WorkerGroupError as error:
            if store.get(job["digest"]) is not None:  # the trial was over
                return
            failure = _failure(error)
        if not isinstance(failure, OutOfMemory) or failure.smaller is None:
            break
        n_out_of_memory += 1
        job |= {"micro_batch_tokens": failure.smaller, "n_out_of_memory": n_out_of_memory}
        if timeout_s is not None:
            job["timeout_s"] = max(0.0, began + timeout_s - time.monotonic())
    cost = Cost(
        wall_s=time.monotonic() - began,
        n_workers=slot.n_workers,
        micro_batch_tokens=job.get("micro_batch_tokens"),
        n_out_of_memory=n_out_of_memory,
    )
    spec = TrialSpec.model_validate_json(job["spec"])
    store.put(TrialRecord(digest=spec.digest, spec=spec, status="failed", cause=failure.cause, message=failure.message[:2000], cost=cost))


def _failure(error) -> TrialFailure:
    """Why a group failed, from what its processes raised; where one runs out of memory, the others may fail for want of it.

    Raises:
        ray.train.WorkerGroupError: the error itself, where a process was lost.
    """
    told = [failure for _, failure in sorted(error.worker_failures.items()) if isinstance(failure, TrialFailure)]
    for failure in sorted(told, key=lambda failure: failure.cause is not Cause.OUT_OF_MEMORY):
        if failure.cause is not Cause.LOST:
            return failure
    raise error
