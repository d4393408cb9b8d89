"""The state of a running sweep: which records stand, which trials run, and what happens when one ends."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llmft.records import TrialRecord
from sweeps.display import Progress
from sweeps.execution.trackers import Tracker
from sweeps.planning import Cell, Plan
from sweeps.search import FailurePolicy, PlannedTrial, RecordBook, Schedule, StudyExporter
from sweeps.store import Store

MANIFEST_EVERY_S = 10.0


class SweepState:
    """What a running sweep knows: the store's records that stand, and what to do when a trial ends.

    Both ways of running, serial and on Ray, are loops over `next_trial` and `ended`.
    """

    def __init__(
        self, plan: Plan, schedule: Schedule, store: Store, policy: FailurePolicy, progress: Progress, studies: StudyExporter,
        trackers: Sequence[Tracker] = (),
    ):  # fmt: skip
        self.plan, self.schedule, self.store, self.policy = plan, schedule, store, policy
        self.progress, self.studies, self.trackers = progress, studies, trackers
        stored = store.load()
        self.records = RecordBook({digest: record for digest, record in stored.items() if policy.settled(record)})
        self.running: dict[str, PlannedTrial] = {}
        progress.running = self.running
        self.n_new = 0
        self._stored = set(stored)
        self._written = time.monotonic()
        for trial in schedule.known(self.records) if trackers else ():
            if trial.digest in self.records:
                self._track(trial, self.records[trial.digest])

    @property
    def waiting(self) -> dict[Cell, int]:
        """Trials that could start now, by cell."""
        n_running = Counter(trial.cell for trial in self.running.values())
        open_trials = {state.cell: len(state.open) - n_running[state.cell] for state in self.schedule.states(self.records)}
        return {cell: n for cell, n in open_trials.items() if n > 0}

    @property
    def done(self) -> bool:
        return not self.running and self.schedule.done(self.records)

    def next_trial(self, fits: Callable[[Cell], bool] = lambda cell: True) -> PlannedTrial | None:
        """A trial to start now, which counts as running from here on; None if those that run must end first.

        Args:
            fits: whether there is room for a trial of a cell.
        """
        trial = self.schedule.next(self.records, self.running, fits)
        if trial is None:
            return None
        if trial.digest in self._stored:  # it failed, or was given up where this plan would not
            self._stored.discard(trial.digest)
            self.records.pop(trial.digest, None)
            self.store.discard(trial.digest)
        self.running[trial.digest] = trial
        return trial

    def runtime_settings(self, trial: PlannedTrial) -> dict[str, Any]:
        """What the plan says of how a trial runs, as arguments of `llmft.runtime.Runtime`."""
        keep = self.plan.keep_weights and trial.spec.test_sets != ()  # trials of the search score no test set
        return {"timeout_s": self.policy.timeout_s, "stop_below": trial.stop_below, "keep_weights": keep}

    def put_back(self, trial: PlannedTrial) -> None:
        """A trial that was handed out could not start; it waits again."""
        del self.running[trial.digest]

    def ended(self, record: TrialRecord) -> None:
        """Take note of a trial's record, which lies in the store already."""
        self._track(self.running.pop(record.digest), record)
        self.records[record.digest] = record
        self.n_new += 1
        self.progress.ended(record)
        self.progress.update(self.records, len(self.running))
        self.studies.update(self.schedule.states(self.records))
        if time.monotonic() - self._written > MANIFEST_EVERY_S:
            self.write_manifest()

    def _track(self, trial: PlannedTrial, record: TrialRecord) -> None:
        for tracker in self.trackers:
            tracker.ended(trial.cell.entry, record)

    def abandon(self, why: str) -> None:
        """Say and write the last word of a process that is about to end."""
        self.progress.close()
        print(f"llmft: {why}", file=sys.stderr, flush=True)
        self.write_manifest()

    def write_manifest(self) -> None:
        self.store.write_manifest(self.plan, self.schedule, self.records)
        self._written = time.monotonic()
