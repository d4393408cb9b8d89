"""The pure core of a sweep: which trials can run now, given what is known. Ray, the serial loop and `llmft plan` all ask it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmft.record import TrialRecord
from llmft.spec import TrialSpec
from sweeps.cells import Cell, Params
from sweeps.search import Outcome, best, judge, n_rounds, suggest

Records = Mapping[str, TrialRecord]


@dataclass(frozen=True)
class Planned:
    """A trial of the plan; `digest` is kept because a sweep asks for it many times.

    Attributes:
        cell: the cell that asks for it.
        stop_below: epoch -> dev accuracy under which the trial is given up (`llmft.runtime.Runtime.stop_below`).
    """

    digest: str
    spec: TrialSpec
    cell: Cell
    stop_below: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What the search of one cell ended with.

    `params` is None if every point failed: the cell has failed, and its report is not run. `dev_accuracy` is the mean over the
    search seeds (None where nothing was searched); `n_points` points were tried in `n_search_trials` trials.
    """

    cell: Cell
    params: Params | None
    dev_accuracy: float | None
    n_points: int
    n_search_trials: int


@dataclass
class CellState:
    """How far one cell is: the trials known so far, by stage and round, and the choice once the search has ended."""

    cell: Cell
    rounds: list[list[Planned]] = field(default_factory=list)
    choice: Choice | None = None
    report: list[Planned] = field(default_factory=list)
    n_search: int = 0
    n_report: int = 0

    @property
    def search(self) -> list[Planned]:
        return [trial for trials in self.rounds for trial in trials]

    @property
    def failed(self) -> bool:
        """Every point of the search failed."""
        return self.choice is not None and self.choice.params is None

    @property
    def total(self) -> int:
        """Trials of this cell, search and report, those not known yet included."""
        return self.n_search + self.n_report


class _CellPlan:
    """Remembers what a cell's rounds ask for: they are fixed by the outcomes before them."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self._rounds: dict[tuple, list[tuple[Params, tuple[Planned, ...]]]] = {}
        self._reports: dict[str, list[Planned]] = {}

    def _round(self, history: list[Outcome], index: int) -> list[tuple[Params, tuple[Planned, ...]]]:
        cell, known = self.cell, tuple(outcome.accuracy for outcome in history)
        if known not in self._rounds:
            points = suggest(cell.ranges, cell.search, cell.key, cell.defaults, history, index)
            self._rounds[known] = [
                (point, _plan(cell, (cell.search_spec(point, seed) for seed in cell.search.seeds))) for point in points
            ]
        return self._rounds[known]

    def _report(self, params: Params) -> list[Planned]:
        key = repr(sorted(params.items()))
        if key not in self._reports:
            self._reports[key] = list(
                _plan(self.cell, (self.cell.report_spec(params, seed) for seed in self.cell.report_seeds))
            )
        return self._reports[key]

    def state(self, records: Records) -> CellState:
        cell, search = self.cell, self.cell.search
        state = CellState(cell, n_report=len(cell.report_seeds))
        history: list[Outcome] = []
        for index in range(n_rounds(search) if search else 0):
            points = self._round(history, index)
            state.rounds.append(list({trial.digest: trial for _, trials in points for trial in trials}.values()))
            if not all(trial.digest in records for trial in state.rounds[-1]):
                n_missing = search.n_trials - (len(history) + len(points))
                state.n_search = len(state.search) + n_missing * len(search.seeds)
                return state
            history += [judge(point, [records[trial.digest] for trial in trials], cell.selection) for point, trials in points]
        state.n_search = len(state.search)
        chosen = best(history) if search else Outcome({}, None)
        state.choice = Choice(
            cell, chosen.params if chosen else None, chosen.accuracy if chosen else None, len(history), len(state.search)
        )
        if chosen is None:
            state.n_report = 0
        else:
            state.report = self._report(chosen.params)
        return state


def _plan(cell: Cell, specs: Iterable[TrialSpec]) -> tuple[Planned, ...]:
    return tuple(Planned(spec.digest, spec, cell) for spec in specs)


class Schedule:
    """Which trials a plan consists of, as far as what is known determines it.

    Args:
        cells: from `build_cells`.

    Every method takes the records that stand, by digest, and changes nothing: the same records give the same answer.
    """

    def __init__(self, cells: Iterable[Cell]):
        self._cells = [_CellPlan(cell) for cell in cells]

    def states(self, records: Records) -> list[CellState]:
        """How far each cell is, in the plan's order."""
        return [cell.state(records) for cell in self._cells]

    def ready(self, records: Records) -> list[Planned]:
        """The trials that can run now and have no record, in the order in which to start them.

        Cells of one model stand together, since a worker keeps its base model; within them, early rounds come first.
        """
        rank: dict[str, tuple[int, int, Planned]] = {}
        models: dict[str, int] = {}
        for state in self.states(records):
            model = models.setdefault(state.cell.base.model.model_dump_json(), len(models))
            for stage, trials in enumerate([*state.rounds, state.report]):
                for trial in trials:
                    if trial.digest not in records:
                        rank.setdefault(trial.digest, (model, stage, trial))
        return [trial for _, _, trial in sorted(rank.values(), key=lambda entry: entry[:2])]

    def known(self, records: Records) -> list[Planned]:
        """Every trial that is known so far, with or without a record."""
        trials = [trial for state in self.states(records) for trial in [*state.search, *state.report]]
        return list({trial.digest: trial for trial in trials}.values())

    def total(self, records: Records) -> int:
        """How many trials there are in all, those not known yet included; cells whose search failed have no report."""
        return sum(state.total for state in self.states(records))

    def done(self, records: Records) -> bool:
        """Whether nothing is left to run."""
        return all(state.choice is not None for state in self.states(records)) and not self.ready(records)

    def choices(self, records: Records) -> list[Choice]:
        """The outcome of every search that has ended."""
        return [state.choice for state in self.states(records) if state.choice is not None]
