"""What a person sees while a sweep runs: one screen in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from llmft.config import TrialSpec
from llmft.records import TrialRecord
from sweeps.display.live_table import CellRow, Snapshot, cell_row, screen
from sweeps.resources import remaining_s
from sweeps.search import CellState, PlannedTrial, Records, Schedule, failed

LINE_EVERY_S, LOOK_EVERY_S, REFRESH_PER_S = 20.0, 0.5, 2
LOOK_SHARE, LOOK_AT_LEAST_EVERY_S = 0.05, 5.0
"""Of the time, what looking at the records may take: with very many of them it is done less often."""


class Progress:
    """Shows a sweep's progress until its block ends.

    Args:
        schedule: the sweep's.
        concurrency: trials at a time.
        console: where to; a screen that is drawn again and again if it is a terminal.

    Attributes:
        running: the trials that run now, by digest; whoever runs them keeps it up to date.
    """

    def __init__(self, schedule: Schedule, concurrency: int = 1, console: Console | None = None):
        self.schedule, self.concurrency = schedule, concurrency
        self.console = console or Console(stderr=True)
        self.console.file = self.console.file  # as it is now: while Ray runs, standard output is muted
        self.running: Mapping[str, PlannedTrial] = {}
        self.n_retried = 0
        self._started = self._printed = self._looked = time.monotonic()
        self._look_at = 0.0
        self._n_at_start: int | None = None
        self._n_running = 0
        self._read: dict[str, tuple[CellState, CellRow]] = {}  # the row that was made of a cell's state
        self._rows: list[CellRow] = []
        self._snapshot: Snapshot | None = None
        self._status, self._statuses = "", {""}
        self._messages: list[Text] = []
        self._live = Live(console=self.console, get_renderable=self._screen, refresh_per_second=REFRESH_PER_S, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_interactive and self.console.encoding.startswith("utf"):
            self._live.start()
        return self

    def close(self) -> None:
        """Give the terminal back, with all that was said."""
        if self._live.is_started:
            self._live.stop()
            for message in self._messages:
                self._print(message)

    def __exit__(self, kind: type | None, *_) -> None:
        self.close()
        if self._snapshot and (kind is None or self._snapshot.n_new):  # a mistake that stops a sweep at its start is one line
            self.say(self._snapshot.line)

    def say(self, text: str, style: str = "") -> None:
        """A line that stays: at the foot of the screen first, and printed when that is taken down; at once where there is none."""
        message = Text(text, style)
        if self._live.is_started:
            self._messages.append(message)
        else:
            self._print(message)

    def status(self, text: str) -> None:
        """What the sweep waits for: workers, GPUs, a cluster that grows; empty for nothing. It stands until the next."""
        if text not in self._statuses and not self._live.is_started:
            self._print(Text(text))
        self._statuses.add(text)
        self._status = text

    def retried(self, spec: TrialSpec, reason: str) -> None:
        """Note that a trial is started again."""
        self.n_retried += 1
        self.say(f"again: {_name(spec, spec.digest)}: {reason}", "yellow")

    def ended(self, record: TrialRecord) -> None:
        """Note the end of a trial; a failure is said at once."""
        if failed(record):
            self.say(f"failed: {_name(record.spec, record.digest)} {record.cause}: {record.message}", "red")

    def update(self, records: Records, n_running: int, last: bool = False) -> None:
        """Look at what is known; cheap when called often."""
        now, self._n_running = time.monotonic(), n_running
        if now < self._look_at and not last:
            return
        states = self.schedule.states(records)
        rows = [self._row(state, records) for state in states]
        n_done = sum(row.n_done for row in rows)
        first = self._n_at_start is None  # which also imports a lot
        if first:
            self._n_at_start = n_done
        self._rows = rows
        self._snapshot = Snapshot(
            n_done=n_done,
            n_failed=sum(row.n_failed for row in rows),
            n_flagged=sum(row.n_flagged for row in rows),
            n_retried=self.n_retried,
            n_total=sum(row.n_total for row in rows),
            n_cells_done=sum(row.stage == "done" for row in rows),
            n_cells=len(rows),
            n_running=n_running,
            n_new=n_done - self._n_at_start,
            elapsed_s=now - self._started,
            eta_s=remaining_s(states, records, self.concurrency),
        )
        if not self._live.is_started and not last and now - self._printed >= LINE_EVERY_S:
            self._printed = now
            self.say(", ".join(filter(None, [self._snapshot.line, self._status])))
        took_s = 0.0 if first else time.monotonic() - now
        self._looked, self._look_at = now, now + min(max(LOOK_EVERY_S, took_s / LOOK_SHARE), LOOK_AT_LEAST_EVERY_S)

    def _row(self, state: CellState, records: Records) -> CellRow:
        seen, row = self._read.get(state.cell.key, (None, None))
        if row is None or state is not seen:
            row = cell_row(state, records)
            self._read[state.cell.key] = state, row
        return row

    def _screen(self) -> RenderableType:
        rows, snapshot, now = self._rows, self._snapshot, time.monotonic()
        if snapshot:  # what changes between two looks
            eta_s = None if snapshot.eta_s is None else max(0.0, snapshot.eta_s - (now - self._looked))
            snapshot = replace(snapshot, n_running=self._n_running, elapsed_s=now - self._started, eta_s=eta_s)
            n_running = Counter(trial.cell.key for trial in list(self.running.values()))
            rows = [replace(row, n_running=n_running[row.cell.key]) for row in rows]
        return screen(snapshot, rows, self._status, self._messages, *self.console.size)

    def _print(self, message: Text) -> None:
        self.console.print(message, soft_wrap=True)


def _name(spec: TrialSpec, digest: str) -> str:
    return f"{spec.task} {spec.method} {spec.n_shots} shots seed {spec.data_seed} ({digest})"
