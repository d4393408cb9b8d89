"""How far one cell of a plan is, given the records that there are: its search in rounds, its choice, its reported trials."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmft.config import TrialSpec
from llmft.records import TrialRecord
from sweeps.planning import Cell, Params
from sweeps.search.optuna_search import PointOutcome, Search, best_point, summarize_point
from sweeps.search.pruning import counts, failed, pruning_thresholds

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

    `records` are those found for the trials; `outcome` is there once they say how every trial ends.
    """

    round: int
    params: Params
    trials: tuple[PlannedTrial, ...]
    records: tuple[TrialRecord | None, ...] = ()
    outcome: PointOutcome | None = None

    def look(self, records: Records) -> Point:
        """The same point as `records` say it stands now."""
        found = tuple(records.get(trial.digest) for trial in self.trials)
        if len(found) == len(self.records) and all(new is old for new, old in zip(found, self.records, strict=True)):
            return self
        ended = all(_ended(trial, records) for trial in self.trials)
        stop_below, selection = self.trials[0].stop_below, self.trials[0].cell.selection
        return replace(self, records=found, outcome=summarize_point(self.params, found, selection, stop_below) if ended else None)


@dataclass(frozen=True)
class CellChoice:
    """What the search of one cell ended with.

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
    """How far one cell is: the trials known so far, and the choice once the search has ended.

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


class _Stage:
    """The trials of one round, or of the report, and how they stand."""

    def __init__(self, trials: Iterable[PlannedTrial], points: Iterable[Point] = ()):
        self.trials, self.points = list(trials), list(points)
        self.open: list[PlannedTrial] = []
        self._by_digest = {trial.digest: trial for trial in self.trials}
        self._ended: set[str] = set()
        self._failed: set[str] = set()
        self._stale = set(self._by_digest)
        self._looked = False

    def note(self, written: Collection[str] | None) -> None:
        """Remember whose records may have changed; None: any."""
        self._stale |= self._by_digest.keys() if written is None else self._by_digest.keys() & written

    def look(self, records: Records) -> None:
        """Bring it up to date with what was noted."""
        if self._looked and not self._stale:
            return
        for digest in self._stale:
            record = records.get(digest)
            ended = record is not None and counts(record, self._by_digest[digest].stop_below)
            (self._ended.add if ended else self._ended.discard)(digest)
            (self._failed.add if ended and failed(record) else self._failed.discard)(digest)
        self._stale, self._looked = set(), True
        self.open = [trial for trial in self.trials if trial.digest not in self._ended]
        self.points = [point.look(records) for point in self.points]

    def count_in(self, state: CellState) -> None:
        state.open = [*state.open, *self.open]
        state.n_done += len(self.trials) - len(self.open)
        state.n_failed += len(self._failed)


class CellTracker:
    """One cell, and what was computed about it: a round's points and trials are fixed by the outcomes before them."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self._search = Search(cell.space, cell.search, cell.key, cell.defaults) if cell.search else None
        self._rounds: list[tuple[list[Params], _Stage]] = []
        self._reports: dict[str, _Stage] = {}
        self._choice = CellChoice(cell, {}, None, 0, 0)
        self._judged: list[PointOutcome] = []
        self.asked: list[str] = []  # digests, for the schedule to take note of

    def state(self, records: Records, written: Collection[str] | None) -> CellState:
        """How far the cell is; `written` are the digests whose records may have changed since the last time, None: all."""
        for stage in (*(stage for _, stage in self._rounds), *self._reports.values()):
            stage.note(written)
        state = CellState(self.cell, n_report=len(self.cell.report_seeds))
        for stage in self._walk(state, records):
            stage.count_in(state)
        if state.failed:
            state.n_report = 0
        elif state.choice:
            report = self._report(state.choice.params)
            report.look(records)
            report.count_in(state)
            state.report = report.trials
        return state

    def _walk(self, state: CellState, records: Records) -> Iterator[_Stage]:
        """Go through the rounds of the search as far as records lead."""
        search, outcomes = self._search, []
        for index in range(search.n_rounds if search else 0):
            stage = self._round(index, state)
            stage.look(records)
            state.points += stage.points
            state.rounds.append(stage.trials)
            yield stage
            outcomes = [point.outcome for point in stage.points]
            if None in outcomes:
                break
            search.tell(index, outcomes)
        if search:
            n_known = sum(len(trials) for trials in state.rounds)
            state.n_search = n_known + (search.n_points - len(state.points)) * len(self.cell.search.seeds)
        if None not in outcomes:
            state.choice = self._choose(state)

    def _round(self, index: int, state: CellState) -> _Stage:
        """The round after those in `state`."""
        asked = self._search.ask(index)
        if index >= len(self._rounds) or self._rounds[index][0] is not asked:
            points, known = self._plan_points(index, asked, state.points), {trial.digest for trial in state.search}
            trials = {trial.digest: trial for point in points for trial in point.trials if trial.digest not in known}
            self._rounds[index:] = [(asked, _Stage(trials.values(), points))]
            self.asked += trials
        return self._rounds[index][1]

    def _plan_points(self, index: int, asked: list[Params], earlier: Sequence[Point]) -> list[Point]:
        cell, points = self.cell, list(earlier)
        curves = [point.outcome.curve for point in earlier]
        for params in asked:
            trials = next((point.trials for point in points if point.params == params), None)
            if trials is None:
                specs = [cell.search_spec(params, seed) for seed in cell.search.seeds]
                stop_below = pruning_thresholds(cell.search.prune, specs[0].train, curves)
                trials = tuple(PlannedTrial(spec.digest, spec, cell, stop_below) for spec in specs)
            points.append(Point(index, params, trials))
        return points[len(earlier) :]

    def _choose(self, state: CellState) -> CellChoice:
        outcomes = [point.outcome for point in state.points]
        if outcomes != self._judged:
            chosen, n_pruned = best_point(outcomes), sum(outcome.pruned for outcome in outcomes)
            params, score = (chosen.params, chosen.score) if chosen else (None, None)
            self._choice = CellChoice(self.cell, params, score, len(outcomes), state.n_search, n_pruned)
            self._judged = outcomes
        return self._choice

    def _report(self, params: Params) -> _Stage:
        key = repr(sorted(params.items()))
        if key not in self._reports:
            specs = [self.cell.report_spec(params, seed) for seed in self.cell.report_seeds]
            self._reports[key] = _Stage(PlannedTrial(spec.digest, spec, self.cell) for spec in specs)
            self.asked += [trial.digest for trial in self._reports[key].trials]
        return self._reports[key]


def _ended(trial: PlannedTrial, records: Records) -> bool:
    record = records.get(trial.digest)
    return record is not None and counts(record, trial.stop_below)
