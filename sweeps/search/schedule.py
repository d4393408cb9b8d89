"""Which trials of a plan can run now, given the records that there are. Running on Ray, serial running and `llmft plan` use it."""

from __future__ import annotations

from collections import UserDict, defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import replace

from llmft.records import TrialRecord
from sweeps.planning import Cell
from sweeps.search.cell_state import CellChoice, CellState, CellTracker, PlannedTrial, Records


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


class Schedule:
    """Which trials a plan consists of, as far as what is known determines it.

    Args:
        cells: from `build_cells`.

    Every method takes the records that stand, by digest, and changes nothing: the same records give the same answer. With a
    `RecordBook`, a cell is looked at again only after a record of one of its trials was written.
    """

    def __init__(self, cells: Iterable[Cell]):
        self.cells = list(cells)
        self._cells = [CellTracker(cell) for cell in self.cells]
        models: dict[str, int] = {}
        self._models = [models.setdefault(plan.cell.base.model.model_dump_json(), len(models)) for plan in self._cells]
        self._asking: dict[str, set[int]] = defaultdict(set)  # digest -> cells that have asked for it
        self._states: list[CellState] = []
        self._book: RecordBook | None = None
        self._n_read = 0

    def states(self, records: Records) -> list[CellState]:
        """How far each cell is, in the plan's order. The state of a cell without news is the same object as before."""
        if isinstance(records, RecordBook) and records is self._book:
            if self._n_read == len(records.written):
                return self._states
            news = set(records.written[self._n_read :])
            written: set[str] | None = news
            cells = {cell for digest in news for cell in self._asking.get(digest, ())}
        else:
            self._book = records if isinstance(records, RecordBook) else None
            written, cells = None, set(range(len(self._cells)))
            self._states = [CellState(cell) for cell in self.cells]
        if self._book is not None:
            self._n_read = len(self._book.written)
            records = self._book.data
        states = list(self._states)
        for index in cells:
            cell = self._cells[index]
            states[index] = cell.state(records, written)
            while cell.asked:
                self._asking[cell.asked.pop()].add(index)
        self._states = states
        return states

    def ready(self, records: Records) -> list[PlannedTrial]:
        """The trials that can run now and have not ended, in the order in which to start them.

        Cells of one model stand together, since a worker keeps its base model; within them, early rounds come first.
        """
        states = self.states(records)
        trials: dict[str, PlannedTrial] = {}
        for index in sorted(range(len(states)), key=lambda index: (self._models[index], states[index].stage)):
            for trial in states[index].open:
                trials.setdefault(trial.digest, trial)
        return [self._for_all(trial) for trial in trials.values()]

    def next(self, records: Records, running: Container[str], fits: Callable[[Cell], bool] = lambda cell: True) -> PlannedTrial | None:
        """The first of the `ready` trials whose digest is not in `running` and whose cell `fits`; cheaper than the whole list."""
        first: tuple[int, int, PlannedTrial] | None = None
        for model, state in zip(self._models, self.states(records), strict=True):
            if state.open and (first is None or (model, state.stage) < first[:2]) and fits(state.cell):
                trial = next((trial for trial in state.open if trial.digest not in running), None)
                first = (model, state.stage, trial) if trial else first
        return self._for_all(first[2]) if first else None

    def _for_all(self, trial: PlannedTrial) -> PlannedTrial:
        """The trial as all cells that wait for it need it: given up only where each of them would."""
        if not trial.stop_below:
            return trial
        others = [
            other.stop_below for index in self._asking[trial.digest] for other in self._states[index].open if other.digest == trial.digest
        ]
        lowest = {
            epoch: min(stop_below[epoch] for stop_below in others)
            for epoch in trial.stop_below
            if all(epoch in stop_below for stop_below in others)
        }
        return replace(trial, stop_below=lowest)

    def known(self, records: Records) -> list[PlannedTrial]:
        """Every trial that is known so far, with or without a record."""
        return list({t.digest: t for state in self.states(records) for t in (*state.search, *state.report)}.values())

    def total(self, records: Records) -> int:
        """How many trials there are in all, those not known yet included; cells whose search failed have no report."""
        return sum(state.total for state in self.states(records))

    def done(self, records: Records) -> bool:
        """Whether nothing is left to run."""
        return all(state.complete for state in self.states(records))

    def choices(self, records: Records) -> list[CellChoice]:
        """The outcome of every search that has ended."""
        return [state.choice for state in self.states(records) if state.choice is not None]
