"""What Ray Tune asks: which trial next, and what of one that ended. The answers come from the state; Tune decides nothing."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from llmft.errors import Cause, UserError
from llmft.records import TrialRecord
from sweeps.execution import SweepState
from sweeps.planning import Cell
from sweeps.ray_backend.losses import diagnose, reason_of
from sweeps.resources import ResourceRequest
from sweeps.search import Loss, PlannedTrial
from sweeps.store import StoreUnwritable

GIVE_UP_AFTER = 4
"""Trials in a row that were lost, after which the fault is taken to lie with the machine or the installation."""


LOOK_EVERY_S, WAITS_S = 1.0, 5.0
"""How often it is looked for trials that wait for their place, and how long one waits before that is said."""

STARTING = "starting workers ..."


class ScheduleSearcher(Searcher):
    """Hands out the schedule's trials, and reads from the store how they ended.

    Args:
        state: what is known.
        job_of: a trial -> what its worker must know (a Tune configuration).
        request_of: a trial -> what it gets.
        fits: for which cells there is room now for one more trial; None: for none.

    Attributes:
        error: why the sweep must stop; `SweepCallback` raises it.
    """

    def __init__(
        self, state: SweepState, job_of: Callable[[PlannedTrial], dict[str, Any]], request_of: Callable[[PlannedTrial], ResourceRequest],
        fits: Callable[[], Callable[[Cell], bool] | None],
    ):  # fmt: skip
        super().__init__()
        self.state, self.job_of, self.request_of, self.fits = state, job_of, request_of, fits
        self.trials: dict[str, PlannedTrial] = {}
        self.error: BaseException | None = None
        self._losses: dict[str, Counter[Loss]] = {}  # of a trial's digest
        self._n_lost_in_a_row = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Searcher.FINISHED is a string
        if self.error or self.state.done:
            return Searcher.FINISHED
        fits = self.fits()
        trial = self.state.next_trial(fits) if fits else None
        if trial is None:
            return None
        self.trials[trial_id] = trial
        self.state.progress.update(self.state.records, len(self.state.running))
        return self.job_of(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if error:
            return  # `on_loss` follows, which knows why
        try:  # what is raised here would turn a finished trial into a failed one
            trial = self.trials.pop(trial_id)
            self._ended(trial, self.state.store.get(trial.digest))
        except Exception as problem:
            self.error = problem

    def on_loss(self, trial_id: str, error: BaseException | None, started: bool) -> None:
        """A trial lost its process.

        Args:
            started: Tune starts the trial again by itself; if not (its worker never came up), the trial is put back.
        """
        try:
            trial = self.trials[trial_id] if started else self.trials.pop(trial_id)
            if unwritable := _unwritable(error):
                raise unwritable
            self._note_loss(trial, diagnose(error), reason_of(error))
            if not started:
                self._ended(trial, self.state.store.get(trial.digest))
        except Exception as problem:
            self.error = problem

    def _ended(self, trial: PlannedTrial, record: TrialRecord | None) -> None:
        if record is None:
            self.state.put_back(trial)
            return
        if record.cause is not Cause.LOST:
            self._n_lost_in_a_row = 0
        self._losses.pop(trial.digest, None)
        self.state.ended(record)

    def _note_loss(self, trial: PlannedTrial, loss: Loss, reason: str) -> None:
        losses = self._losses.setdefault(trial.digest, Counter())
        losses[loss] += 1
        if not self.state.policy.gives_up(losses):
            if loss is not Loss.RECYCLED:
                self.state.progress.retried(trial.spec, loss)
            return
        record = TrialRecord(
            digest=trial.digest, spec=trial.spec, status="failed", cause=Cause.LOST,
            message=f"{loss} each of {losses[loss]} times: {reason}",
        )  # fmt: skip
        if self.state.store.get(trial.digest) is None:
            self.state.store.put(record)  # the worker that takes the trial up next finds it, and is done
        self._n_lost_in_a_row += 1
        if self._n_lost_in_a_row == GIVE_UP_AFTER:
            self.error = UserError(f"workers: {GIVE_UP_AFTER} trials in a row lost their process, the sweep stops. The last: {reason}")

    def __deepcopy__(self, memo: dict) -> ScheduleSearcher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that is never made: the store is what a sweep starts from

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        return None


class Done(Exception):
    """Nothing is left to run."""


class SweepCallback(tune.Callback):
    """Tells the searcher of trials that lost their process, shows what is waited for, and ends the experiment where it must end."""

    def __init__(self, searcher: ScheduleSearcher):
        self.searcher = searcher
        self._begun = False
        self._placed: set[str] = set()  # ids of trials that have their worker
        self._since: dict[str, float] = {}  # of the others: when they were seen first
        self._look_at = 0.0

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        if self.searcher.error:
            raise self.searcher.error
        state = self.searcher.state
        if state.done:
            raise Done  # an experiment that ends by itself writes down what it knows of every trial, and reads it again: 5 ms each
        state.progress.update(state.records, len(state.running))  # also while no trial ends
        now = time.monotonic()
        if now > self._look_at:
            self._look_at = now + LOOK_EVERY_S
            state.progress.status(self._waits_for(now))

    def _waits_for(self, now: float) -> str:
        flying = self.searcher.trials
        self._placed &= flying.keys()
        self._since = {trial_id: self._since.get(trial_id, now) for trial_id in flying.keys() - self._placed}
        if all(now - since < WAITS_S for since in self._since.values()):
            return "" if self._begun else STARTING
        slots = [self.searcher.request_of(trial) for trial in flying.values()]
        there = ray.cluster_resources()
        for unit, wanted in (("GPU", sum(slot.total_gpus for slot in slots)), ("CPU", sum(slot.total_cpus for slot in slots))):
            if (lack := wanted - there.get(unit, 0.0)) > 0:
                return f"waiting for {lack:.3g} more {unit}{'s' if lack > 1 else ''}: the cluster is full, or still growing"
        return STARTING

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._begun = True
        self._placed.add(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._placed.discard(trial.trial_id)
        self.searcher.on_loss(trial.trial_id, _last_error(trial), started=True)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.searcher.on_loss(trial.trial_id, _last_error(trial), started=False)


def _unwritable(error: BaseException | None) -> StoreUnwritable | None:
    """What a worker met when it wanted to store its record, where that is why it failed."""
    while error is not None and not isinstance(cause := getattr(error, "cause", error), StoreUnwritable):
        error = error.__cause__
    return StoreUnwritable(str(cause)) if error is not None else None


def _last_error(trial: Any) -> BaseException | None:
    """What Tune caught last; from its working folder, since `Trial.get_pickled_error` looks where it is copied much later."""
    try:
        return pickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # never written, or of a class that this process cannot load
        return None
