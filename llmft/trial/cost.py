"""What a trial costs, and on what it ran."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llmft.evaluation import Evaluator
from llmft.prompting import DEV, EncodedTrial
from llmft.records import Teacher
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
        if found := re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()):
            return int(found.group(1)) * 1024
    return 0


def flops(n_parameters: int, n_trained_tokens: int, n_evaluated_tokens: int) -> float:
    """Kaplan et al. 2020: 6 per parameter and trained token, 2 per evaluated token. Attention is left out."""
    return 6.0 * n_parameters * n_trained_tokens + 2.0 * n_parameters * n_evaluated_tokens


@cache
def packages() -> dict[str, str]:
    """Versions of what decides an answer."""
    found = {"python": platform.python_version()}
    for name in ("llmft", "torch", "transformers", "peft", "tokenizers", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def work_done(result: TrainingResult, evaluator: Evaluator, teacher: Teacher | None, n_parameters: int) -> dict[str, float]:
    """Fields of `Cost` about steps, tokens and arithmetic."""
    of_teacher = flops(teacher.n_parameters, 0, teacher.n_tokens) if teacher else 0.0
    return {
        "tokens_trained": result.n_tokens,
        "tokens_evaluated": evaluator.n_tokens,
        "tokens_teacher": teacher.n_tokens if teacher else 0,
        "flops": flops(n_parameters, result.n_tokens, evaluator.n_tokens) + of_teacher,
        "n_steps": result.n_steps,
    }


def tokens_per_query(encoded: EncodedTrial, names: Mapping[str, str]) -> float:
    lengths = [length for name in list(names) or [DEV] for length in encoded.lengths(name)]
    return sum(lengths) / max(1, len(lengths))
