"""Run a plan: what is missing from the store, and nothing else."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llmft.errors import UserError
from llmft.files import Place
from llmft.record import TrialRecord
from sweeps.cell_plan import Planned
from sweeps.cells import Cell
from sweeps.failures import FailurePolicy
from sweeps.imports import collector_off
from sweeps.own_ray import OwnRay
from sweeps.plan import Plan
from sweeps.prefetch import Needs, moved_models
from sweeps.progress import Progress
from sweeps.prune import failed
from sweeps.schedule import RecordBook, Schedule
from sweeps.store import Store
from sweeps.studies import Mirror
from sweeps.trackers import Tracker, tracking

MANIFEST_EVERY_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: its trials by status, how many ran just now, and the cells whose search failed altogether."""

    n_finished: int
    n_failed: int
    n_new: int
    failed_cells: list[Cell] = field(default_factory=list)


class Ledger:
    """What a running sweep knows: the store's records that stand, and what to do when a trial ends.

    Both ways of running, serial and on Ray, are loops over `next_trial` and `ended`.
    """

    def __init__(
        self, plan: Plan, schedule: Schedule, store: Store, policy: FailurePolicy, progress: Progress, studies: Mirror,
        trackers: Sequence[Tracker] = (),
    ):  # fmt: skip
        self.plan, self.schedule, self.store, self.policy = plan, schedule, store, policy
        self.progress, self.studies, self.trackers = progress, studies, trackers
        stored = store.load()
        self.records = RecordBook({digest: record for digest, record in stored.items() if policy.settled(record)})
        self.running: dict[str, Planned] = {}
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

    def next_trial(self, fits: Callable[[Cell], bool] = lambda cell: True) -> Planned | None:
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

    def runtime_settings(self, trial: Planned) -> dict[str, Any]:
        """What the plan says of how a trial runs, as arguments of `llmft.runtime.Runtime`."""
        keep = self.plan.keep_weights and trial.spec.test_sets != ()  # trials of the search score no test set
        return {"timeout_s": self.policy.timeout_s, "stop_below": trial.stop_below, "keep_weights": keep}

    def put_back(self, trial: Planned) -> None:
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

    def _track(self, trial: Planned, record: TrialRecord) -> None:
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


def check_cells(cells: list[Cell], where: str, check_spec: Callable[[Any], None] | None = None, here: bool = True) -> None:
    """Find what would make every trial of a cell fail, before any trial starts.

    Args:
        here: whether the trials will run on this machine.

    Raises:
        UserError: as `llmft.trial.check_spec`; the line begins with the plan's file, `where`, and the method's entry.
    """
    if check_spec is None:
        with collector_off():
            from llmft import trial

        check_spec = partial(trial.check_spec, here=here)
    for cell in cells:
        try:
            check_spec(cell.base)
            if cell.search:
                check_spec(cell.search_base)
        except UserError as error:
            raise UserError(f"{where}: methods.{cell.entry}: {error}") from None


def run_sweep(
    plan: Plan,
    cells: list[Cell],
    root: Place | str,
    *,
    serial: bool = False,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_trial: float | None = None,
    policy: FailurePolicy | None = None,
    trackers: Sequence[str] = (),
    run_trial: Callable[..., Any] | None = None,
    studies: str | None = None,
    console: Any = None,
    own_ray: OwnRay | None = None,
    verbose: bool = False,
) -> Outcome:
    """Run what the plan asks for and the store lacks. Killed at any moment, the next call finishes the rest.

    Args:
        plan: the plan.
        cells: the plan's cells (`build_cells`).
        root: the folder of results, or its URL.
        serial: one trial after the other in this process, without Ray.
        address: of a running Ray cluster; `root` must then be a URL or a folder that all its nodes share. None: Ray on this machine.
        workers: trials at a time; None: as many as the CPUs, or the GPUs, hold.
        gpus_per_trial: a share of one GPU or a number of them; None: one, where there is one.
        policy: what is tried again.
        trackers: names of experiment trackers that are told of every trial (`sweeps.trackers.TRACKERS`).
        run_trial: what runs a trial, `llmft.trial.run_trial` unless a test says otherwise.
        studies: a database for the searches as Optuna studies, in place of a journal in `root` (`sweeps.studies.Mirror`).
        console: a `rich.console.Console` for the progress.
        own_ray: the Ray on this machine, which may be coming up already; None: one that is there for this call alone.
        verbose: show what Ray and the workers print.

    Raises:
        UserError: the folder cannot be written (or no longer: `StoreUnwritable`), holds a damaged record, or another sweep runs on
            it; a tracker is not installed.
        KeyboardInterrupt: the run was stopped; what had finished is stored.
    """
    store, schedule = Store(root), Schedule(cells)
    policy = replace(policy or FailurePolicy(), timeout_s=plan.trial_timeout_s)
    with (
        store.locked(),
        Progress(schedule, console=console) as progress,
        tracking(trackers, store.root, plan.name, progress.say) as tracked,
    ):
        mirror = Mirror(root, studies, progress.say)
        ledger = Ledger(plan, schedule, store, policy, progress, mirror, tracked)
        mirror.update(schedule.states(ledger.records))
        if store.write_plan(plan):
            progress.say(
                f"{store.root} holds results of another plan too: they stay, and those that this plan shares are not run again."
            )
        for line in moved_models(cells, ledger.records.values()):
            progress.say(line)
        progress.update(ledger.records, 0)
        try:
            if not ledger.done:
                if not address and not (needs := Needs.of(cells)).are_here():  # nodes of a cluster fetch for themselves
                    progress.say(f"fetching {needs}; trials start when they are here")
                    needs.fetch()
                if serial:
                    _run_serially(ledger, run_trial)
                else:
                    with collector_off():
                        from sweeps.cluster import run_on_ray

                    with nullcontext(own_ray) if own_ray else OwnRay(verbose) as ray_here:
                        run_on_ray(
                            ledger, address=address, workers=workers, gpus_per_trial=gpus_per_trial, run_trial=run_trial,
                            own_ray=ray_here, verbose=verbose,
                        )  # fmt: skip
        finally:
            ledger.write_manifest()
            progress.update(ledger.records, 0, last=True)
    states = schedule.states(ledger.records)
    known = [ledger.records[trial.digest] for trial in schedule.known(ledger.records)]
    n_failed = sum(map(failed, known))
    return Outcome(len(known) - n_failed, n_failed, ledger.n_new, [state.cell for state in states if state.failed])


def _run_serially(ledger: Ledger, run_trial: Callable[..., Any] | None) -> None:
    if run_trial is None:
        from llmft.trial import run_trial
    from llmft.runtime import Runtime

    while trial := ledger.next_trial():
        ledger.progress.update(ledger.records, 1)
        result = run_trial(trial.spec, Runtime(**ledger.runtime_settings(trial)))
        ledger.store.put(result.record, result.predictions, result.weights, result.responses)
        ledger.ended(result.record)
