"""What kind of loss lies behind a worker that died: its process, its node, its memory, or a wish for a fresh process."""

from __future__ import annotations

from typing import Any

from llmft.errors import Cause
from llmft.records import TrialRecord
from sweeps.search import Loss

FRESH_PROCESS = frozenset({Cause.OUT_OF_MEMORY, Cause.CRASHED})
"""What an earlier trial in the same process may have brought about (memory not given back, a broken device context)."""


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
