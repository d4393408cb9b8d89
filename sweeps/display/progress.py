"""Progress of a running sweep: a live table in a terminal, a line every 20 seconds elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from llmft.config import TrialSpec
from llmft.records import TrialRecord
from sweeps.display.live_table import CellRow, Snapshot, cell_row, cells_table
from sweeps.search import CellState, PlannedTrial, Records, Schedule, failed

LINE_EVERY_S, UPDATE_EVERY_S, REFRESH_PER_S = 20.0, 0.5, 2
UPDATE_SHARE, UPDATE_AT_LEAST_EVERY_S = 0.05, 5.0
"""The share of the time that reading the records may take: with very many of them updates become rarer."""


class Progress:
    """Show a sweep's progress until the `with` block ends.

    Args:
        schedule: the sweep's.
        concurrency: trials at a time.
        console: where to print; the table is live if it is a terminal. None takes standard error.

    Attributes:
        running: the trials that run now, by digest; kept up to date by whoever runs them.
    """

    def __init__(self, schedule: Schedule, concurrency: int = 1, console: Console | None = None):
        self.schedule, self.concurrency = schedule, concurrency
        self.console = console or Console(stderr=True)
        self.console.file = self.console.file  # as it is now: while Ray runs, standard output is muted
        self.running: Mapping[str, PlannedTrial] = {}
        self.n_retried = 0
        self._started = self._printed = self._updated = time.monotonic()
        self._update_at = 0.0
        self._n_at_start: int | None = None
        self._rows: dict[str, tuple[CellState, CellRow]] = {}  # by the cells' keys, with the state that a row was made of
        self._snapshot = Snapshot()
        self._status, self._statuses = "", {""}
        self._bar = Bar(BarColumn(None), TaskProgressColumn(), TextColumn("{task.description}"), console=self.console, expand=True)
        self._bar.add_task("", total=1)
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=REFRESH_PER_S, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_interactive and self.console.encoding.startswith("utf"):
            self._live.start()
        return self

    def close(self) -> None:
        """Remove the live table; what was printed above it stays."""
        self._live.stop()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close()
        if self._snapshot.rows and (kind is None or self._snapshot.n_new):  # an error that stops a sweep at its start is one line
            self.say(self._snapshot.line)

    def say(self, text: str, style: str = "") -> None:
        """Print a line, above the live table where there is one."""
        self.console.print(Text(text, style), soft_wrap=True)

    def status(self, text: str) -> None:
        """Set what the sweep waits for: workers, GPUs, a cluster that grows; empty for nothing. It is shown until the next call."""
        if text not in self._statuses and not self._live.is_started:
            self.say(text)
        self._statuses.add(text)
        self._status = text

    def retried(self, spec: TrialSpec, reason: str) -> None:
        """Count and print that a trial is started again."""
        self.n_retried += 1
        self.say(f"again: {_name(spec, spec.digest)}: {reason}", "yellow")

    def ended(self, record: TrialRecord) -> None:
        """Print a trial's failure; nothing where it did not fail."""
        if failed(record):
            self.say(f"failed: {_name(record.spec, record.digest)} {record.cause}: {record.message}", "red")

    def update(self, records: Records, n_running: int, last: bool = False) -> None:
        """Show the state that `records` tell; cheap when called often, because most calls return at once."""
        now = time.monotonic()
        if now < self._update_at and not last:
            self._snapshot = replace(self._snapshot, n_running=n_running)
            return
        from sweeps.resources import remaining_s  # imports torch

        states = self.schedule.states(records)
        rows = [self._row(state, records) for state in states]
        n_done, first = sum(row.n_done for row in rows), self._n_at_start is None
        if self._n_at_start is None:
            self._n_at_start = n_done
        eta_s = remaining_s(states, records, self.concurrency)
        self._snapshot = Snapshot(rows, n_running, n_done - self._n_at_start, self.n_retried, now - self._started, eta_s)
        if not self._live.is_started and not last and now - self._printed >= LINE_EVERY_S:
            self._printed = now
            self.say(", ".join(filter(None, [self._snapshot.line, self._status])))
        took_s = 0.0 if first else time.monotonic() - now  # the first also imports a lot
        self._updated, self._update_at = now, now + min(max(UPDATE_EVERY_S, took_s / UPDATE_SHARE), UPDATE_AT_LEAST_EVERY_S)

    def _row(self, state: CellState, records: Records) -> CellRow:
        known, row = self._rows.get(state.cell.key, (None, None))
        if row is None or state is not known:
            row = cell_row(state, records)
            self._rows[state.cell.key] = state, row
        return row

    def _table(self) -> RenderableType:
        """Return what the live display shows now, in at most as many lines as the terminal has."""
        snapshot, now = self._snapshot, time.monotonic()
        if snapshot.rows:  # what changes between two updates
            n_running = Counter(trial.cell.key for trial in list(self.running.values()))
            snapshot = replace(
                snapshot, rows=[replace(row, n_running=n_running[row.cell.key]) for row in snapshot.rows], elapsed_s=now - self._started,
                eta_s=None if snapshot.eta_s is None else max(0.0, snapshot.eta_s - (now - self._updated)),
            )  # fmt: skip
        return self.render(snapshot, *self.console.size)

    def render(self, snapshot: Snapshot, width: int, height: int) -> RenderableType:
        """Return the bar, the counts, what the sweep waits for and the table of cells, in at most `height` lines."""
        lines: list[RenderableType] = []
        if snapshot.rows:
            self._bar.update(self._bar.task_ids[0], completed=snapshot.n_done, total=snapshot.n_total, description=snapshot.time_left)
            lines += [self._bar, _line(f"{snapshot.counts}, {snapshot.pace}")]
            if troubles := [Text(text, style) for text, style in snapshot.troubles.items()]:
                lines.append(Text(", ").join(troubles))
        if self._status:
            lines.append(_line(self._status, "cyan"))
        if snapshot.rows and height - len(lines) > 3:
            lines += ["", *cells_table(snapshot.rows, width, height - len(lines) - 1)]
        return Group(*lines)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _name(spec: TrialSpec, digest: str) -> str:
    return f"{spec.task} {spec.method} {spec.n_shots} shots seed {spec.data_seed} ({digest})"
