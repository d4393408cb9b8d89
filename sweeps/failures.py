"""What a failed trial means for the sweep: settled, or tried again, how often and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llmft.errors import Cause
from llmft.record import TrialRecord

FINAL = frozenset({Cause.DIVERGED, Cause.QUERY_TOO_LONG})
"""Facts of the spec itself: the same trial would fail in the same way."""

FRESH_PROCESS = frozenset({Cause.OUT_OF_MEMORY, Cause.CRASHED})
"""What an earlier trial in the same process may have brought about (memory not given back, a broken device context)."""


class Loss(StrEnum):
    """Why a trial lost its process before it could say how it ended."""

    NODE = "its machine was lost"
    MEMORY = "its machine ran out of memory"
    PROCESS = "its process died"
    RECYCLED = "it asked for a fresh process"


BUDGET = {Loss.NODE: 50, Loss.MEMORY: 2, Loss.PROCESS: 2, Loss.RECYCLED: 50}
"""How many losses of each kind a trial survives. It may be handed to several used processes before it gets a fresh one."""


@dataclass(frozen=True)
class FailurePolicy:
    """When a trial that failed is tried again.

    Within a sweep, a trial that lost its process is started again, up to a budget for each kind of loss: a machine that is lost
    or preempted says nothing about the trial, so its budget only keeps a sweep from going round for ever. A trial that ran
    out of memory or crashed in a process that had run other trials before gets one more go in a fresh process. (Running out of
    device memory within a trial first halves the micro-batch, in the trial itself.) The next run of the plan tries every failed
    trial again, except those of a `FINAL` cause and those that timed out under a limit no shorter; with `retry_failed` those too.

    Attributes:
        budget: how many losses of a kind a trial survives, where it is not as in `BUDGET`.
        timeout_s: the plan's `trial_timeout_s`; a sweep fills it in.
    """

    retry_failed: bool = False
    budget: Mapping[Loss, int] = field(default_factory=dict)
    timeout_s: float | None = None

    def settled(self, record: TrialRecord) -> bool:
        """Whether a record of an earlier run stands."""
        if record.finished or record.cause is Cause.PRUNED:  # whether it was rightly given up, the schedule knows
            return True
        if self.retry_failed:
            return False
        if record.cause is Cause.TIMEOUT:
            return record.cost is not None and self.timeout_s is not None and self.timeout_s <= record.cost.wall_s
        return record.cause in FINAL

    def gives_up(self, losses: Counter[Loss]) -> bool:
        """Whether a trial with these losses is taken to fail for good."""
        budget = {**BUDGET, **self.budget}
        return any(n > budget[loss] for loss, n in losses.items())


def wants_fresh_process(record: TrialRecord, n_trials_before: int) -> bool:
    """Whether a worker that ran `n_trials_before` others should die, so that the trial runs again in a new one."""
    return not record.finished and record.cause in FRESH_PROCESS and n_trials_before > 0


class FreshProcessWanted(RuntimeError):
    """The trial may have failed by what an earlier one left in the process. Ray starts it again in a new one."""


NODE_SIGNS = ("actorunavailableerror", "node has died", "node died", "node was terminated", "node is dead", "nodediederror")
MEMORY_SIGNS = ("outofmemoryerror", "running low on memory", "due to memory pressure")


def diagnose(error: BaseException | None) -> Loss:
    """The kind of loss behind what Ray says of a trial whose process ended.

    Ray tells a lost node from a dead process in words alone, except for preemptions that were announced. Until it has missed the
    node's heartbeat it calls an actor there unavailable; the death of a process on a living node is known at once.
    """
    cause: Any = getattr(error, "cause", None) or error  # what was raised inside the worker, where it was
    text = f"{type(error).__name__} {type(cause).__name__} {cause} {error}".lower()
    if FreshProcessWanted.__name__.lower() in text:
        return Loss.RECYCLED
    if getattr(cause, "preempted", False) or any(sign in text for sign in NODE_SIGNS):
        return Loss.NODE
    if any(sign in text for sign in MEMORY_SIGNS):
        return Loss.MEMORY
    return Loss.PROCESS


def reason_of(error: BaseException | None) -> str:
    """One line that says why a process died, as far as Ray knows."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason known")[:300]
