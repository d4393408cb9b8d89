"""What the training loop needs of its surroundings, so that the same loop runs alone, in a Tune worker and over many GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _identity(network: Any) -> Any:
    return network


def _ignore(progress: dict[str, Any]) -> None:
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Runtime:
    """The plain default: one process, the best device there is, nobody to report to.

    Attributes:
        device: a torch device name; None takes CUDA where there is one.
        rank, world_size: this process among those that train together.
        wrap: makes a network ready for distributed training.
        report: receives progress (a small dictionary) after every look at the dev set.
        should_stop: asked between steps; True ends the trial.
        micro_batch_tokens: upper bound of tokens in one forward pass.
        timeout_s: the trial fails with `Cause.TIMEOUT` when it has taken longer; None: no limit.
        stop_below: epoch -> dev accuracy; a trial whose best so far is lower at that epoch fails with `Cause.PRUNED`.
    """

    device: str | None = None
    rank: int = 0
    world_size: int = 1
    wrap: Callable[[Any], Any] = _identity
    report: Callable[[dict[str, Any]], None] = _ignore
    should_stop: Callable[[], bool] = _never
    micro_batch_tokens: int = 16384
    timeout_s: float | None = None
    stop_below: Mapping[int, float] = field(default_factory=dict)
