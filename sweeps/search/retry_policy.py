"""What a failed trial means for the sweep: settled, or tried again, how often and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llmft.errors import Cause
from llmft.records import TrialRecord

FINAL = frozenset({Cause.DIVERGED, Cause.QUERY_TOO_LONG})
"""Facts of the spec itself: the same trial would fail in the same way."""


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
