"""What the training loop needs of its surroundings, so that the same loop runs alone, in a Tune worker and over many GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmft.errors import Cause, TrialFailure, UserError

if TYPE_CHECKING:
    import torch


class AdaptedModule(Protocol):
    """What a runtime wraps (`llmft.models.AdaptedModel`): a module that holds a model with a device."""

    model: Any

    def to(self, device: torch.device, /) -> torch.nn.Module: ...


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`; None: CUDA where there is one.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    best = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        return torch.device(best)  # unasked: a first tensor makes a context, which holds memory until this process ends
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # no such name; a torch that was built without it
        raise UserError(f"--device: there is no device {name!r} here. Leave it out for the best there is ({best}).") from None
    return device


def _place(adapted: AdaptedModule) -> torch.nn.Module:
    return adapted.to(adapted.model.device)


def _alone(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    return tensor


def _ignore(progress: dict[str, Any]) -> None:
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Runtime:
    """What a trial runs on, and whom it reports to; the default is one process on the best device there is.

    `llmft.models.parallel.distributed_runtime` makes one for a process among several that run the same trial together. All of them
    do the same things in the same order; what is asked of the clock or of `should_stop` is agreed upon.

    Attributes:
        device: a torch device name; None takes CUDA where there is one.
        rank, world_size: this process among those that run the trial together.
        wrap: puts an adapted model, which lies on the CPU, where it shall be, and gives the module to train.
        all_reduce: the "sum" or "max" of a tensor over the processes, element by element.
        report: receives progress (a small dictionary) after every evaluation on dev; in every process alike.
        should_stop: asked between epochs; True in any process ends the training.
        micro_batch_tokens: upper bound of tokens in one forward pass of one process.
        n_out_of_memory: how often the trial ran out of memory before, and was started again with smaller passes.
        timeout_s: the trial fails with `Cause.TIMEOUT` when it has taken longer; None: no limit.
        deadline: the `time.monotonic()` at which `timeout_s` is over; `run_trial` sets it.
        stop_below: epoch -> dev score; a trial whose best so far is lower at that epoch fails with `Cause.PRUNED`.
        keep_weights: whether the trained weights shall come with the result.
    """

    device: str | None = None
    rank: int = 0
    world_size: int = 1
    wrap: Callable[[Any], torch.nn.Module] = _place
    all_reduce: Callable[[torch.Tensor, Literal["sum", "max"]], torch.Tensor] = _alone
    report: Callable[[dict[str, Any]], None] = _ignore
    should_stop: Callable[[], bool] = _never
    micro_batch_tokens: int = 16384
    n_out_of_memory: int = 0
    timeout_s: float | None = None
    deadline: float | None = None
    stop_below: Mapping[int, float] = field(default_factory=dict)
    keep_weights: bool = False

    def started(self) -> Runtime:
        """Return the same runtime with the clock running."""
        return self if self.timeout_s is None else replace(self, deadline=time.monotonic() + self.timeout_s)

    def largest(self, value: float) -> float:
        """Return the largest `value` of all processes."""
        return self._reduce(value, "max")

    def mean(self, value: float) -> float:
        """Return the mean `value` of all processes."""
        return self._reduce(value, "sum") / self.world_size

    def check_time(self) -> None:
        """Check the time limit; every process must call this in the same positions, so that all stop together.

        Raises:
            TrialFailure: the time is over for one of them (TIMEOUT).
        """
        if self.deadline is not None and self.largest(time.monotonic() > self.deadline):
            raise TrialFailure(Cause.TIMEOUT, f"it was not done after {self.timeout_s:g} s.")

    def _reduce(self, value: float, operation: Literal["sum", "max"]) -> float:
        if self.world_size == 1:
            return value
        import torch

        return float(self.all_reduce(torch.tensor(float(value), dtype=torch.float64), operation))
