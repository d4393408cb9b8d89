"""What a person sees while a sweep runs: a live table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from llmft.record import TrialRecord
from llmft.spec import TrialSpec
from sweeps.estimate import remaining_s
from sweeps.prune import failed
from sweeps.schedule import CellState, Records, Schedule

LINE_EVERY_S, LOOK_EVERY_S = 20.0, 0.5


@dataclass(frozen=True)
class Snapshot:
    """How far a sweep is. `eta_s` is None until a trial has ended; `n_new` counts the trials that ended in this run."""

    n_done: int
    n_failed: int
    n_total: int
    n_cells_done: int
    n_cells: int
    n_running: int
    n_new: int
    elapsed_s: float
    eta_s: float | None

    @property
    def line(self) -> str:
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        done = f"{self.n_done}/{self.n_total} trials, {self.n_cells_done}/{self.n_cells} cells{failed}"
        if self.n_done == self.n_total:
            return f"{done}, took {duration(self.elapsed_s)}"
        rate = f"{60 * self.n_new / self.elapsed_s:.1f} trials/min" if self.n_new and self.elapsed_s else "starting"
        left = (
            f"about {duration(self.eta_s)} left" if self.eta_s is not None else "time left unknown until the first trials end"
        )
        return f"{done}, {self.n_running} running, {rate}, {left}"


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Shows a sweep's progress until its block ends.

    Args:
        schedule: the sweep's.
        concurrency: trials at a time.
        console: where to; a live display if it is a terminal.
    """

    def __init__(self, schedule: Schedule, concurrency: int = 1, console: Console | None = None):
        self.schedule, self.concurrency = schedule, concurrency
        self.console = console or Console(stderr=True)
        self._started = self._looked = self._printed = time.monotonic()
        self.n_retried = 0
        self._n_at_start: int | None = None
        self._states: list[CellState] = []
        self._snapshot: Snapshot | None = None
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def close(self) -> None:
        """Give the terminal back."""
        if self.console.is_terminal:
            self._live.stop()

    def __exit__(self, kind: type | None, *_) -> None:
        self.close()
        if self._snapshot and (kind is None or self._snapshot.n_new):  # a mistake that stops a sweep at its start is one line
            self.say(self._snapshot.line)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self, record: TrialRecord) -> None:
        """Note the end of a trial; a failure is said at once."""
        if failed(record):
            spec = record.spec
            self.say(
                f"failed: {spec.task} {spec.method} {spec.n_shots} shots seed {spec.data_seed} ({record.digest}) {record.cause}: {record.message}"
            )

    def retried(self, spec: TrialSpec, reason: str) -> None:
        """Note that a trial is started again."""
        self.n_retried += 1
        self.say(f"again: {spec.task} {spec.method} {spec.n_shots} shots seed {spec.data_seed} ({spec.digest}): {reason}")

    def update(self, records: Records, n_running: int, last: bool = False) -> None:
        """Look at what is known; cheap when called often."""
        now = time.monotonic()
        if not last and self._snapshot is not None and now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        states = self._states = self.schedule.states(records)
        n_done = sum(state.n_done for state in states)
        if self._n_at_start is None:
            self._n_at_start = n_done
        self._snapshot = Snapshot(
            n_done=n_done,
            n_failed=sum(state.n_failed for state in states),
            n_total=sum(state.total for state in states),
            n_cells_done=sum(state.complete for state in states),
            n_cells=len(states),
            n_running=n_running,
            n_new=n_done - self._n_at_start,
            elapsed_s=now - self._started,
            eta_s=remaining_s(states, records, self.concurrency),
        )
        if not self.console.is_terminal and not last and now - self._printed >= LINE_EVERY_S:
            self._printed = now
            self.say(self._snapshot.line)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        if self._snapshot is None:
            table.add_row("starting workers ...")
            return table
        table.add_row(self._snapshot.line)
        open_cells = [state for state in self._states if state.choice is None or state.choice.dev_accuracy is not None]
        for state in open_cells[-8:]:
            accuracy = state.choice.dev_accuracy if state.choice else None
            note = f"best on dev {accuracy:.3f}" if accuracy is not None else "searching" if state.choice is None else ""
            table.add_row(f"  {state.cell}: {note}")
        return table
