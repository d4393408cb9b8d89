"""The pure core of a sweep: which trials can run now, given what is known. Ray, the serial loop and `llmft plan` all ask it."""

from __future__ import annotations

from collections import UserDict, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmft.record import TrialRecord
from llmft.spec import TrialSpec
from sweeps.cells import Cell
from sweeps.prune import counts, failed, floors
from sweeps.search import Outcome, Search, best, judge
from sweeps.space import Params

Records = Mapping[str, TrialRecord]


class RecordBook(UserDict[str, TrialRecord]):
    """Records by digest that note what is written into them, so that a `Schedule` looks again only at the cells concerned."""

    def __init__(self, records: Records | None = None):
        self.written: list[str] = []
        super().__init__(records or {})

    def __setitem__(self, digest: str, record: TrialRecord) -> None:
        self.written.append(digest)
        super().__setitem__(digest, record)

    def __delitem__(self, digest: str) -> None:
        self.written.append(digest)
        super().__delitem__(digest)


@dataclass(frozen=True)
class Planned:
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
    trials: tuple[Planned, ...]
    records: tuple[TrialRecord | None, ...] = ()
    outcome: Outcome | None = None

    def look(self, records: Records) -> Point:
        """The same point as `records` say it stands now."""
        found = tuple(records.get(trial.digest) for trial in self.trials)
        if len(found) == len(self.records) and all(new is old for new, old in zip(found, self.records, strict=True)):
            return self
        ended = all(_ended(trial, records) for trial in self.trials)
        stop_below, selection = self.trials[0].stop_below, self.trials[0].cell.selection
        return replace(self, records=found, outcome=judge(self.params, found, selection, stop_below) if ended else None)


@dataclass(frozen=True)
class Choice:
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
    choice: Choice | None = None
    rounds: list[list[Planned]] = field(default_factory=list)
    report: list[Planned] = field(default_factory=list)
    open: list[Planned] = field(default_factory=list)
    n_done: int = 0
    n_failed: int = 0
    n_search: int = 0
    n_report: int = 0

    @property
    def search(self) -> list[Planned]:
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

    def __init__(self, trials: Iterable[Planned], points: Iterable[Point] = ()):
        self.trials, self.points = list(trials), list(points)
        self.open: list[Planned] = []
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


class _CellPlan:
    """One cell, and what was computed about it: a round's points and trials are fixed by the outcomes before them."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self._search = Search(cell.space, cell.search, cell.key, cell.defaults) if cell.search else None
        self._rounds: list[tuple[list[Params], _Stage]] = []
        self._reports: dict[str, _Stage] = {}
        self._choice = Choice(cell, {}, None, 0, 0)
        self._judged: list[Outcome] = []
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
                stop_below = floors(cell.search.prune, specs[0].train, curves)
                trials = tuple(Planned(spec.digest, spec, cell, stop_below) for spec in specs)
            points.append(Point(index, params, trials))
        return points[len(earlier) :]

    def _choose(self, state: CellState) -> Choice:
        outcomes = [point.outcome for point in state.points]
        if outcomes != self._judged:
            chosen, n_pruned = best(outcomes), sum(outcome.pruned for outcome in outcomes)
            params, score = (chosen.params, chosen.score) if chosen else (None, None)
            self._choice = Choice(self.cell, params, score, len(outcomes), state.n_search, n_pruned)
            self._judged = outcomes
        return self._choice

    def _report(self, params: Params) -> _Stage:
        key = repr(sorted(params.items()))
        if key not in self._reports:
            specs = [self.cell.report_spec(params, seed) for seed in self.cell.report_seeds]
            self._reports[key] = _Stage(Planned(spec.digest, spec, self.cell) for spec in specs)
            self.asked += [trial.digest for trial in self._reports[key].trials]
        return self._reports[key]


class Schedule:
    """Which trials a plan consists of, as far as what is known determines it.

    Args:
        cells: from `build_cells`.

    Every method takes the records that stand, by digest, and changes nothing: the same records give the same answer. With a
    `RecordBook`, a cell is looked at again only after a record of one of its trials was written.
    """

    def __init__(self, cells: Iterable[Cell]):
        self.cells = list(cells)
        self._cells = [_CellPlan(cell) for cell in self.cells]
        models: dict[str, int] = {}
        self._models = [models.setdefault(plan.cell.base.model.model_dump_json(), len(models)) for plan in self._cells]
        self._asking: dict[str, set[int]] = defaultdict(set)  # digest -> cells that have asked for it
        self._states: list[CellState] = []
        self._book: RecordBook | None = None
        self._n_read = 0

    def states(self, records: Records) -> list[CellState]:
        """How far each cell is, in the plan's order. The state of a cell without news is the same object as before."""
        if isinstance(records, RecordBook) and records is self._book:
            written = set(records.written[self._n_read :])
            cells = {cell for digest in written for cell in self._asking.get(digest, ())}
        else:
            self._book = records if isinstance(records, RecordBook) else None
            written, cells = None, range(len(self._cells))
            self._states = [None] * len(self._cells)
        if self._book is not None:
            self._n_read = len(self._book.written)
            records = self._book.data
        for index in cells:
            cell = self._cells[index]
            self._states[index] = cell.state(records, written)
            while cell.asked:
                self._asking[cell.asked.pop()].add(index)
        return list(self._states)

    def ready(self, records: Records) -> list[Planned]:
        """The trials that can run now and have not ended, in the order in which to start them.

        Cells of one model stand together, since a worker keeps its base model; within them, early rounds come first.
        """
        states, trials = self.states(records), {}
        for index in sorted(range(len(states)), key=lambda index: (self._models[index], states[index].stage)):
            for trial in states[index].open:
                trials.setdefault(trial.digest, trial)
        return [self._for_all(trial) for trial in trials.values()]

    def next(
        self, records: Records, running: Container[str], fits: Callable[[Cell], bool] = lambda cell: True
    ) -> Planned | None:
        """The first of the `ready` trials whose digest is not in `running` and whose cell `fits`; cheaper than the whole list."""
        first: tuple[int, int, Planned] | None = None
        for model, state in zip(self._models, self.states(records), strict=True):
            if state.open and (first is None or (model, state.stage) < first[:2]) and fits(state.cell):
                trial = next((trial for trial in state.open if trial.digest not in running), None)
                first = (model, state.stage, trial) if trial else first
        return self._for_all(first[2]) if first else None

    def _for_all(self, trial: Planned) -> Planned:
        """The trial as all cells that wait for it need it: given up only where each of them would."""
        if not trial.stop_below:
            return trial
        others = [
            other.stop_below
            for index in self._asking[trial.digest]
            for other in self._states[index].open
            if other.digest == trial.digest
        ]
        lowest = {
            epoch: min(stop_below[epoch] for stop_below in others)
            for epoch in trial.stop_below
            if all(epoch in stop_below for stop_below in others)
        }
        return replace(trial, stop_below=lowest)

    def known(self, records: Records) -> list[Planned]:
        """Every trial that is known so far, with or without a record."""
        return list({t.digest: t for state in self.states(records) for t in (*state.search, *state.report)}.values())

    def total(self, records: Records) -> int:
        """How many trials there are in all, those not known yet included; cells whose search failed have no report."""
        return sum(state.total for state in self.states(records))

    def done(self, records: Records) -> bool:
        """Whether nothing is left to run."""
        return all(state.complete for state in self.states(records))

    def choices(self, records: Records) -> list[Choice]:
        """The outcome of every search that has ended."""
        return [state.choice for state in self.states(records) if state.choice is not None]


def _ended(trial: Planned, records: Records) -> bool:
    record = records.get(trial.digest)
    return record is not None and counts(record, trial.stop_below)
