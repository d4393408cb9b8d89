"""What a trial costs, and on what it ran."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from llmft.evaluation import Evaluator
from llmft.models import n_parameters
from llmft.prompting import DEV, EncodedTrial
from llmft.records import Cost, Teacher
from llmft.runtime import Runtime
from llmft.training import TrainingResult

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory in use since it was made: of the device, or (on a CPU, under Linux) of this process beyond where it began."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                RESET.write_text("5")  # the kernel forgets the old peak
            self.start = _status_bytes("VmRSS")

    @property
    def n_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _status_bytes("VmHWM") - self.start)


def _status_bytes(name: str) -> int:
    with suppress(OSError):
        if match := re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()):
            return int(match.group(1)) * 1024
    return 0


class CostMeter:
    """Measures what a trial costs, from its stages as they pass."""

    def __init__(self, device: torch.device, began: float):
        """`began`: the `time.perf_counter()` at which the trial began."""
        self._device, self._began, self._wall_s = device, began, 0.0
        self._stages: dict[str, float] = {}
        self._n_parameters = self._n_trainable = 0

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave out the time of what other trials share; memory is measured from its end."""
        started = time.perf_counter()
        yield
        self._began += time.perf_counter() - started
        self._memory = PeakMemory(self._device)

    @contextmanager
    def timed(self, field: Literal["train_s", "evaluate_s", "forgetting_s"]) -> Iterator[None]:
        """Measure a stage; the trial's wall time ends with training or evaluation."""
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._stages[field] = ended - started
        if field != "forgetting_s":
            self._wall_s = ended - self._began

    def count_parameters(self, network: torch.nn.Module) -> None:
        """Count the base model's parameters, before a method prepares it."""
        self._n_parameters = n_parameters(network)

    def count_trainable(self, network: torch.nn.Module) -> None:
        """Count the parameters that are trained, before they are sharded."""
        self._n_trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)

    def cost(
        self,
        network: torch.nn.Module,
        result: TrainingResult,
        evaluator: Evaluator,
        teacher: Teacher | None,
        runtime: Runtime,
        tokens_per_query: float,
    ) -> Cost:
        """Sum up the trial; every process must call this."""
        n, n_teacher_tokens = self._n_parameters, teacher.n_tokens if teacher else 0
        of_teacher = flops(teacher.n_parameters, 0, n_teacher_tokens) if teacher else 0.0
        return Cost(
            wall_s=self._wall_s,
            **self._stages,
            device=device_name(self._device),
            peak_memory_bytes=int(runtime.largest(self._memory.n_bytes)),
            n_parameters=n,
            n_trainable_parameters=self._n_trainable,
            stored_bytes=sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad),
            tokens_per_query=tokens_per_query,
            tokens_trained=result.n_tokens,
            tokens_evaluated=evaluator.n_tokens,
            tokens_teacher=n_teacher_tokens,
            flops=flops(n, result.n_tokens, evaluator.n_tokens) + of_teacher,
            n_steps=result.n_steps,
            n_workers=runtime.world_size,
            micro_batch_tokens=runtime.micro_batch_tokens,
            n_out_of_memory=runtime.n_out_of_memory,
        )


def flops(n_parameters: int, n_trained_tokens: int, n_evaluated_tokens: int) -> float:
    """Kaplan et al. 2020: 6 per parameter and trained token, 2 per evaluated token. Attention is left out."""
    return 6.0 * n_parameters * n_trained_tokens + 2.0 * n_parameters * n_evaluated_tokens


@cache
def packages() -> dict[str, str]:
    """Versions of what decides an answer."""
    versions = {"python": platform.python_version()}
    for name in ("llmft", "torch", "transformers", "peft", "tokenizers", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def tokens_per_query(encoded: EncodedTrial, names: Mapping[str, str]) -> float:
    lengths = [length for name in list(names) or [DEV] for length in encoded.lengths(name)]
    return sum(lengths) / max(1, len(lengths))
