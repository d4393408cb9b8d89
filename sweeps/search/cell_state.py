"""The state of one cell of a plan, given the records that there are: the rounds of its search, its choice, its reported trials."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmft.config import TrialSpec
from llmft.records import TrialRecord
from sweeps.planning import Cell, Params, SearchPlan
from sweeps.search.optuna_search import PointOutcome, Search, best_point, summarize_point
from sweeps.search.pruning import Curve, counts, failed, pruning_thresholds

Records = Mapping[str, TrialRecord]
"""Records by digest."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial of the plan; `digest` is kept because a sweep asks for it many times.

    Attributes:
        cell: the cell that asks for it.
        stop_below: epoch -> dev score under which the trial is given up (`llmft.runtime.Runtime.stop_below`).
    """

    digest: str
    spec: TrialSpec
    cell: Cell
    stop_below: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A point of a search: its round, from 0, and its trials, one for each search seed.

    `records` are those of its trials, None for a trial without; `outcome` is there once every trial has ended.
    """

    round: int
    params: Params
    trials: tuple[PlannedTrial, ...]
    records: tuple[TrialRecord | None, ...] = ()
    outcome: PointOutcome | None = None

    def updated(self, records: Records) -> Point:
        """Return the same point as it stands by `records`."""
        current = tuple(records.get(trial.digest) for trial in self.trials)
        if len(current) == len(self.records) and all(new is old for new, old in zip(current, self.records, strict=True)):
            return self
        ended = [
            record for trial, record in zip(self.trials, current, strict=True) if record is not None and counts(record, trial.stop_below)
        ]
        if len(ended) < len(self.trials):
            return replace(self, records=current, outcome=None)
        first = self.trials[0]
        return replace(self, records=current, outcome=summarize_point(self.params, ended, first.cell.selection, first.stop_below))


@dataclass(frozen=True)
class CellChoice:
    """The outcome of the search of one cell.

    `params` is None if every point failed or was pruned: the cell has failed, and its report is not run. `dev_score` is the
    mean over the search seeds (None where nothing was searched); `n_points` points were tried in `n_search_trials` trials, and
    `n_pruned_points` of them were given up.
    """

    cell: Cell
    params: Params | None
    dev_score: float | None
    n_points: int
    n_search_trials: int
    n_pruned_points: int = 0


@dataclass
class CellState:
    """The state of one cell: the trials known so far, and the choice once the search has ended.

    Attributes:
        points: of the search, in the order in which they were asked for.
        rounds: the trials of the search by round, each where it was asked for first.
        report: the reported trials, once they are known.
        open: known trials that are still to run, or are running: without a record, or with one that does not tell their end.
        n_done: known trials that have ended, failures included.
        n_failed: those of them that failed; one that was given up did not.
        n_search, n_report: trials of each stage, those not known yet included.
    """

    cell: Cell
    points: list[Point] = field(default_factory=list)
    choice: CellChoice | None = None
    rounds: list[list[PlannedTrial]] = field(default_factory=list)
    report: list[PlannedTrial] = field(default_factory=list)
    open: list[PlannedTrial] = field(default_factory=list)
    n_done: int = 0
    n_failed: int = 0
    n_search: int = 0
    n_report: int = 0

    @property
    def search(self) -> list[PlannedTrial]:
        return [trial for trials in self.rounds for trial in trials]

    @property
    def failed(self) -> bool:
        """No point of the search came to its end."""
        return self.choice is not None and self.choice.params is None

    @property
    def complete(self) -> bool:
        """Nothing is left to run."""
        return self.choice is not None and not self.open

    @property
    def total(self) -> int:
        """Trials of this cell, search and report, those not known yet included."""
        return self.n_search + self.n_report

    @property
    def stage(self) -> int:
        """The round that the search is in, from 0; after it the number of its rounds."""
        return len(self.rounds) - (self.choice is None)


class _TrialGroup:
    """The trials of one round or of the report, with those that have not ended (`open`)."""

    def __init__(self, trials: Iterable[PlannedTrial], points: Iterable[Point] = ()):
        self.trials, self.points = list(trials), list(points)
        self.open: list[PlannedTrial] = []
        self._by_digest = {trial.digest: trial for trial in self.trials}
        self._ended: set[str] = set()
        self._failed: set[str] = set()
        self._stale = set(self._by_digest)
        self._is_new = True

    def mark_stale(self, written: Collection[str] | None) -> None:
        """Remember whose records may have changed; None: any."""
        self._stale |= self._by_digest.keys() if written is None else self._by_digest.keys() & written

    def update(self, records: Records) -> None:
        """Read the records that may have changed."""
        if not self._is_new and not self._stale:
            return
        self._ended -= self._stale
        self._failed -= self._stale
        for digest in self._stale:
            record = records.get(digest)
            if record is not None and counts(record, self._by_digest[digest].stop_below):
                self._ended.add(digest)
                if failed(record):
                    self._failed.add(digest)
        self._stale, self._is_new = set(), False
        self.open = [trial for trial in self.trials if trial.digest not in self._ended]
        self.points = [point.updated(records) for point in self.points]

    def add_to(self, state: CellState) -> None:
        """Add the trials to the counts of the cell."""
        state.open = [*state.open, *self.open]
        state.n_done += len(self.trials) - len(self.open)
        state.n_failed += len(self._failed)


class CellTracker:
    """Follows one cell, and keeps what it has computed: the points and trials of a round are fixed by the outcomes before it."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self._rounds: list[tuple[list[Params], _TrialGroup]] = []
        self._reports: dict[str, _TrialGroup] = {}
        self._search = Search(cell.space, cell.search, cell.key, cell.defaults) if cell.search else None
        self._choice = CellChoice(cell, {}, None, 0, 0)
        self._chosen_from: list[PointOutcome] = []
        self.asked: list[str] = []  # digests, for the schedule to take note of

    def state(self, records: Records, written: Collection[str] | None) -> CellState:
        """Compute the state of the cell; `written` are the digests whose records may have changed since the last time, None: all."""
        for group in (*(group for _, group in self._rounds), *self._reports.values()):
            group.mark_stale(written)
        state = CellState(self.cell, n_report=len(self.cell.report_seeds))
        if self._search is None:
            state.choice = self._choice
        elif self.cell.search is not None:
            self._follow_search(self._search, self.cell.search, state, records)
        if state.choice is None:
            return state
        if state.choice.params is None:
            state.n_report = 0
            return state
        report = self._report(state.choice.params)
        report.update(records)
        report.add_to(state)
        state.report = report.trials
        return state

    def _follow_search(self, search: Search, plan: SearchPlan, state: CellState, records: Records) -> None:
        """Go through the rounds of the search as far as records lead."""
        outcomes: list[PointOutcome] = []
        for index in range(search.n_rounds):
            group = self._round(search, plan, index, state, outcomes)
            group.update(records)
            state.points += group.points
            state.rounds.append(group.trials)
            group.add_to(state)
            ended = [point.outcome for point in group.points if point.outcome is not None]
            outcomes += ended
            if len(ended) < len(group.points):
                break
            search.tell(index, ended)
        n_known = sum(len(trials) for trials in state.rounds)
        state.n_search = n_known + (search.n_points - len(state.points)) * len(plan.seeds)
        if len(outcomes) == search.n_points:
            state.choice = self._choose(outcomes, state.n_search)

    def _round(self, search: Search, plan: SearchPlan, index: int, state: CellState, outcomes: Sequence[PointOutcome]) -> _TrialGroup:
        """Give the round after those in `state`; `outcomes` are those of the points before it."""
        asked = search.ask(index)
        if index >= len(self._rounds) or self._rounds[index][0] is not asked:
            points = self._plan_points(plan, index, asked, state.points, [outcome.curve for outcome in outcomes])
            known = {trial.digest for trial in state.search}
            trials = {trial.digest: trial for point in points for trial in point.trials if trial.digest not in known}
            self._rounds[index:] = [(asked, _TrialGroup(trials.values(), points))]
            self.asked += trials
        return self._rounds[index][1]

    def _plan_points(
        self, plan: SearchPlan, index: int, asked: list[Params], earlier: Sequence[Point], curves: Sequence[Curve]
    ) -> list[Point]:
        points = list(earlier)
        for params in asked:
            trials = next((point.trials for point in points if point.params == params), None)
            if trials is None:
                specs = [self.cell.search_spec(params, seed) for seed in plan.seeds]
                stop_below = pruning_thresholds(plan.prune, specs[0].train, curves)
                trials = tuple(PlannedTrial(spec.digest, spec, self.cell, stop_below) for spec in specs)
            points.append(Point(index, params, trials))
        return points[len(earlier) :]

    def _choose(self, outcomes: list[PointOutcome], n_search_trials: int) -> CellChoice:
        if outcomes != self._chosen_from:
            best, n_pruned = best_point(outcomes), sum(outcome.pruned for outcome in outcomes)
            params, score = (best.params, best.score) if best else (None, None)
            self._choice = CellChoice(self.cell, params, score, len(outcomes), n_search_trials, n_pruned)
            self._chosen_from = outcomes
        return self._choice

    def _report(self, params: Params) -> _TrialGroup:
        key = repr(sorted(params.items()))
        if key not in self._reports:
            specs = [self.cell.report_spec(params, seed) for seed in self.cell.report_seeds]
            self._reports[key] = _TrialGroup(PlannedTrial(spec.digest, spec, self.cell) for spec in specs)
            self.asked += [trial.digest for trial in self._reports[key].trials]
        return self._reports[key]
