"""One screen about a running sweep: how far it is, a row for each cell, and what was said last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmft.records import TrialRecord
from sweeps.planning import Cell
from sweeps.search import CellState, Records, best_point

if TYPE_CHECKING:
    pass


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


N_MESSAGES = 5
"""Lines at the foot of the screen, fewer on a small one."""


@dataclass(frozen=True)
class CellRow:
    """How far a cell is. Accuracies are shares in [0, 1], None where there are none yet.

    Attributes:
        n_report: 0 where the search failed.
        n_flagged: trials with a finding of severity warning or error.
        dev: of the best point of the search so far, the mean over its seeds on dev; points with a seed to come do not count.
        in_domain: mean over the reported trials so far, at the checkpoint that dev selected; `out_of_domain` alike.
    """

    cell: Cell
    n_searched: int
    n_search: int
    n_reported: int
    n_report: int
    n_running: int = 0
    n_failed: int = 0
    n_flagged: int = 0
    dev: float | None = None
    in_domain: float | None = None
    out_of_domain: float | None = None

    @property
    def n_done(self) -> int:
        return self.n_searched + self.n_reported

    @property
    def n_total(self) -> int:
        return self.n_search + self.n_report

    @property
    def model(self) -> str:
        """The last part of a hub name or path: the rest is rarely what tells models apart, and has no room."""
        return self.cell.base.model.name.rstrip("/").rpartition("/")[2]

    @property
    def stage(self) -> str:
        if self.n_done == self.n_total:
            return "done"
        return "under way" if self.n_done or self.n_running else "waiting"


def cell_row(state: CellState, records: Records) -> CellRow:
    """The row of a cell, from how far it is and the records that stand, by digest; `n_running` is not known here."""
    open_now = {trial.digest for trial in state.open}
    ended = [records[trial.digest] for trial in [*state.search, *state.report] if trial.digest not in open_now]
    reported = [records[trial.digest] for trial in state.report if trial.digest not in open_now]
    chosen = best_point([point.outcome for point in state.points if point.outcome])
    return CellRow(
        cell=state.cell,
        n_searched=len(ended) - len(reported),
        n_search=state.n_search,
        n_reported=len(reported),
        n_report=state.n_report,
        n_failed=state.n_failed,
        n_flagged=sum(any(finding.severity != "note" for finding in record.findings) for record in ended),
        dev=chosen.score if chosen else None,
        in_domain=_mean_score(reported, "in"),
        out_of_domain=_mean_score(reported, "out"),
    )


def _mean_score(records: Iterable[TrialRecord], domain: str) -> float | None:
    found = []
    for record in records:
        selection = "best_dev" if "best_dev" in record.spec.selections else record.spec.selections[0]
        sets = [numbers for numbers in record.metrics.get(selection, {}).values() if numbers.domain == domain]
        found += [sets[0].score] if sets else []  # the first set of a domain, as in the report's table
    return fmean(found) if found else None


def in_order(rows: Sequence[CellRow]) -> list[CellRow]:
    """The cells that change now first, then those with results, then those that wait; else in the plan's order."""
    return sorted(rows, key=lambda row: (not row.n_running, STAGES.index(row.stage)))


STAGES = ("under way", "done", "waiting")


class Column(NamedTuple):
    """A column of the table of cells; `needed` says whether it tells anything about these rows."""

    title: str
    text: Callable[[CellRow], str]
    needed: Callable[[Sequence[CellRow]], bool] = lambda rows: True
    style: str = ""
    is_name: bool = False


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _mark(row: CellRow) -> str:
    if row.n_running:
        return "•"
    return {"done": "✓" if row.n_report else "✗"}.get(row.stage, "")


COLUMNS = (
    Column("", _mark, is_name=True),
    Column("model", lambda row: row.model, lambda rows: len({row.cell.base.model for row in rows}) > 1, is_name=True),
    Column("task", lambda row: row.cell.base.task, lambda rows: len({row.cell.base.task for row in rows}) > 1, is_name=True),
    Column("method", lambda row: row.cell.entry, is_name=True),
    Column("shots", lambda row: str(row.cell.base.n_shots)),
    Column("search", lambda row: f"{row.n_searched}/{row.n_search}" if row.n_search else "-"),
    Column("report", lambda row: f"{row.n_reported}/{row.n_report}" if row.n_report else "-"),
    Column("failed", lambda row: str(row.n_failed or ""), lambda rows: any(row.n_failed for row in rows), "red"),
    Column("flagged", lambda row: str(row.n_flagged or ""), lambda rows: any(row.n_flagged for row in rows), "yellow"),
    Column("dev %", lambda row: _percent(row.dev)),
    Column("in %", lambda row: _percent(row.in_domain)),
    Column("out %", lambda row: _percent(row.out_of_domain)),
)


def screen(
    snapshot: Snapshot | None, rows: Sequence[CellRow], status: str, messages: Sequence[Text], width: int, height: int
) -> RenderableType:
    """Everything, in at most `height` lines.

    Args:
        snapshot: how far the sweep is; None before that is known.
        rows: of all cells.
        status: what is waited for.
        messages: those that were said, the last one last.
        width: of the terminal; `height` alike.
    """
    head = _head(snapshot) if snapshot else []
    head += [_line(status, "cyan")] if status else []
    foot = [_line(message.plain, message.style) for message in messages[-max(1, min(N_MESSAGES, height // 6)) :]]
    foot = [Text(), *foot] if foot else []
    room = height - len(head) - len(foot) - 3  # a blank line, the columns' titles, the line about the cells that do not fit
    body = [Text(), *_cells(in_order(rows), room, gap=1 if width < 100 else 2)] if rows and room > 0 else []
    return Group(*head, *body, *foot)


def _line(text: str, style: str = "") -> Text:
    return Text(" ".join(text.split()), style, no_wrap=True, overflow="ellipsis")


def _head(snapshot: Snapshot) -> list[RenderableType]:
    share = snapshot.n_done / snapshot.n_total if snapshot.n_total else 1.0
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    bar.add_column(ratio=1)
    bar.add_row(ProgressBar(total=1.0, completed=share), f"{math.floor(100 * share)} %", _line(snapshot.left))
    troubles = Text(", ").join([Text(text, style) for text, style in snapshot.troubles])
    return [bar, _line(f"{snapshot.counts}, {snapshot.pace}"), *([troubles] if troubles else [])]


def _cells(rows: Sequence[CellRow], room: int, gap: int) -> list[RenderableType]:
    """The first rows as a table, and a line about those for which there is no room."""
    shown, hidden = (rows, []) if len(rows) <= room + 1 else (rows[:room], rows[room:])
    columns = [column for column in COLUMNS if column.needed(rows)]
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="left" if column.is_name else "right", no_wrap=not column.is_name)
    for row in shown:
        cells = [Text(column.text(row), column.style, no_wrap=True, overflow="ellipsis") for column in columns]
        table.add_row(*cells, style="bold" if row.n_running else "dim" if row.stage == "waiting" else "")
    if not hidden:
        return [table]
    stages = Counter(row.stage for row in hidden)
    return [
        table,
        _line(f"... and {len(hidden)} more cells: {', '.join(f'{n} {stage}' for stage, n in stages.items())}", "dim"),
    ]
