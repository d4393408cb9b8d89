"""What a person sees while a sweep runs: one screen in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from llmft.record import TrialRecord
from llmft.spec import TrialSpec
from sweeps.cell_plan import CellState, Planned, Records
from sweeps.estimate import remaining_s
from sweeps.prune import failed
from sweeps.schedule import Schedule
from sweeps.screen import CellRow, cell_row, screen

LINE_EVERY_S, LOOK_EVERY_S, REFRESH_PER_S = 20.0, 0.5, 2
LOOK_SHARE, LOOK_AT_LEAST_EVERY_S = 0.05, 5.0
"""Of the time, what looking at the records may take: with very many of them it is done less often."""


@dataclass(frozen=True)
class Snapshot:
    """How far a sweep is.

    Attributes:
        n_new: trials that ended in this run.
        n_flagged: trials with a finding of severity warning or error.
        n_retried: how often a trial was started again.
        eta_s: seconds to the end; None until that can be told.
    """

    n_done: int
    n_failed: int
    n_flagged: int
    n_retried: int
    n_total: int
    n_cells_done: int
    n_cells: int
    n_running: int
    n_new: int
    elapsed_s: float
    eta_s: float | None

    @property
    def counts(self) -> str:
        return f"{self.n_done}/{self.n_total} trials, {self.n_cells_done}/{self.n_cells} cells"

    @property
    def pace(self) -> str:
        rate = f", {60 * self.n_new / self.elapsed_s:.1f} trials/min" if self.n_new and self.elapsed_s else ""
        return f"{self.n_running} running{rate}"

    @property
    def troubles(self) -> list[tuple[str, str]]:
        """What went wrong so far, each with a style."""
        numbers = [
            (self.n_failed, "failed", "red"),
            (self.n_flagged, "flagged", "yellow"),
            (self.n_retried, "retried", "yellow"),
        ]
        return [(f"{n} {what}", style) for n, what, style in numbers if n]

    @property
    def left(self) -> str:
        if self.n_done == self.n_total:
            return f"took {duration(self.elapsed_s)}"
        if self.eta_s is None:
            return "time left not known yet"
        return f"about {duration(self.eta_s)} left"

    @property
    def line(self) -> str:
        pace = [self.pace] if self.n_done < self.n_total else []
        return ", ".join([self.counts, *(text for text, _ in self.troubles), *pace, self.left])


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
        console: where to; a screen that is drawn again and again if it is a terminal.

    Attributes:
        running: the trials that run now, by digest; whoever runs them keeps it up to date.
    """

    def __init__(self, schedule: Schedule, concurrency: int = 1, console: Console | None = None):
        self.schedule, self.concurrency = schedule, concurrency
        self.console = console or Console(stderr=True)
        self.console.file = self.console.file  # as it is now: while Ray runs, standard output is muted
        self.running: Mapping[str, Planned] = {}
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
