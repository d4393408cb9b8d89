"""What a failed trial means for the sweep: settled or tried again, in this process or a fresh one."""

from __future__ import annotations

from dataclasses import dataclass

from llmft.errors import Cause
from llmft.record import TrialRecord

FINAL = frozenset({Cause.DIVERGED, Cause.QUERY_TOO_LONG})
"""Facts of the spec itself: the same trial would fail in the same way."""

FRESH_PROCESS = frozenset({Cause.OUT_OF_MEMORY, Cause.CRASHED})
"""What an earlier trial in the same process may have brought about (memory not given back, a broken device context)."""


@dataclass(frozen=True)
class FailurePolicy:
    """When a failed trial is tried again.

    Within a sweep, a trial whose process died is started again up to `max_lost` times, and one that ran out of memory or
    crashed in a process that had run other trials before gets one more go in a fresh process. The next run of the plan tries
    every failed trial again, except those of a `FINAL` cause; with `retry_failed` those too.
    """

    retry_failed: bool = False
    max_lost: int = 2

    def settled(self, record: TrialRecord) -> bool:
        """Whether a record of an earlier run stands."""
        return record.finished or (record.cause in FINAL and not self.retry_failed)

    def wants_fresh_process(self, record: TrialRecord, n_trials_before: int) -> bool:
        """Whether a worker that ran `n_trials_before` others should die, so that the trial runs again in a new one."""
        return not record.finished and record.cause in FRESH_PROCESS and n_trials_before > 0
