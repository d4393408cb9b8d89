"""Trials by a group of real processes over gloo, for the tests."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmft.config.spec import TrialSpec
from llmft.errors import TrialFailure
from llmft.models.adapted import AdaptedModel
from llmft.models.parallel import distributed_runtime
from llmft.trial.run import run_trial

PATIENCE_S = 200.0


@dataclass(frozen=True)
class Run:
    """A trial, further fields of its `Runtime`, and what each process does first (a function of this module)."""

    spec: TrialSpec
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], Any] | None = None


def run_in_group(folder: Path, strategy: str, runs: Mapping[str, Run], n: int = 2) -> list[dict[str, Any]]:
    """What each of `n` processes got from each trial: a result, or the failure that it raised and with which it ended.

    What a run's `before` gave is kept under the function's name.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, n, port, str(folder), strategy, runs)) for rank in range(n)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE_S
    try:
        for process in processes:
            process.join(deadline - time.monotonic())
            assert process.exitcode is not None, "a process of the group hangs"
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(n)]


def _work(rank: int, n: int, port: int, folder: str, strategy: str, runs: Mapping[str, Run]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n)
    got: dict[str, Any] = {}
    for name, run in runs.items():
        if run.before:
            got[run.before.__name__] = run.before()
        try:
            got[name] = run_trial(run.spec, distributed_runtime(strategy, "cpu", **run.settings))
        except TrialFailure as failure:
            got[name] = failure
        Path(folder, str(rank)).write_bytes(pickle.dumps(got))
        if isinstance(got[name], TrialFailure):
            return
    dist.destroy_process_group()


def _in_training(act: Callable[[], None]) -> None:
    """From now on `act` comes before every training pass."""
    real = AdaptedModel.forward

    def forward(self, compute, *given):
        if compute.__name__ == "loss":
            act()
        return real(self, compute, *given)

    AdaptedModel.forward = forward


def seeds_used() -> set[int]:
    """Filled in training with what torch's generator was seeded with."""
    seeds: set[int] = set()
    _in_training(lambda: seeds.add(torch.initial_seed()))
    return seeds


def second_has_no_memory() -> None:
    def act():
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    _in_training(act)


def second_dies() -> None:
    def act():
        if dist.get_rank() == 1:
            os._exit(9)

    _in_training(act)


def scaled_step() -> tuple[bool, bool]:
    """Whether a gradient that is infinite in the last shard alone changes scale and weights of a sharded model, here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]
    output = model(torch.ones(1, 4))
    scaler.scale(output[0, 3] * torch.inf).backward()
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    unmoved = all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))
    return scaler.get_scale() < scale, unmoved
