"""The state of a running sweep: its counts in one line, and a table with a row for each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmft.records import TrialRecord
from sweeps.planning import Cell
from sweeps.search import CellState, Records, best_point

STAGES = ("under way", "done", "waiting")


@dataclass(frozen=True)
class CellRow:
    """The state of one cell. Accuracies are shares in [0, 1], None where there are none yet.

    Attributes:
        n_report: 0 where the search failed.
        n_flagged: trials with a finding of severity warning or error.
        dev: score on dev of the best point of the search so far, mean over its seeds; points with a trial to come do not count.
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
    def stage(self) -> str:
        """One of `STAGES`."""
        if self.n_done == self.n_total:
            return "done"
        return "under way" if self.n_done or self.n_running else "waiting"


@dataclass(frozen=True)
class Snapshot:
    """The state of a sweep.

    Attributes:
        n_new: trials that ended in this run.
        n_retried: how often a trial was started again.
        eta_s: seconds to the end; None while that is unknown.
    """

    rows: Sequence[CellRow] = ()
    n_running: int = 0
    n_new: int = 0
    n_retried: int = 0
    elapsed_s: float = 0.0
    eta_s: float | None = None

    @property
    def n_done(self) -> int:
        return sum(row.n_done for row in self.rows)

    @property
    def n_total(self) -> int:
        return sum(row.n_total for row in self.rows)

    @property
    def counts(self) -> str:
        n_cells_done = sum(row.stage == "done" for row in self.rows)
        return f"{self.n_done}/{self.n_total} trials, {n_cells_done}/{len(self.rows)} cells"

    @property
    def pace(self) -> str:
        rate = f", {60 * self.n_new / self.elapsed_s:.1f} trials/min" if self.n_new and self.elapsed_s else ""
        return f"{self.n_running} running{rate}"

    @property
    def troubles(self) -> dict[str, str]:
        """What went wrong so far -> the style that it is shown in."""
        n_failed, n_flagged = sum(row.n_failed for row in self.rows), sum(row.n_flagged for row in self.rows)
        numbers = (n_failed, "failed", "red"), (n_flagged, "flagged", "yellow"), (self.n_retried, "retried", "yellow")
        return {f"{n} {what}": style for n, what, style in numbers if n}

    @property
    def time_left(self) -> str:
        if self.n_done == self.n_total:
            return f"took {duration(self.elapsed_s)}"
        return "time left not known yet" if self.eta_s is None else f"about {duration(self.eta_s)} left"

    @property
    def line(self) -> str:
        """Everything in one line."""
        pace = [self.pace] if self.n_done < self.n_total else []
        return ", ".join([self.counts, *self.troubles, *pace, self.time_left])


def duration(seconds: float) -> str:
    """Write seconds as 45 s, 3 min 20 s or 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cell_row(state: CellState, records: Records) -> CellRow:
    """Return the row of a cell, without `n_running`.

    Args:
        state: of the cell.
        records: by digest, those that `state` was computed from.
    """
    open_digests = {trial.digest for trial in state.open}
    searched, reported = (
        [records[trial.digest] for trial in trials if trial.digest not in open_digests] for trials in (state.search, state.report)
    )
    best = best_point([point.outcome for point in state.points if point.outcome])
    return CellRow(
        cell=state.cell, n_searched=len(searched), n_search=state.n_search, n_reported=len(reported), n_report=state.n_report,
        n_failed=state.n_failed,
        n_flagged=sum(any(finding.severity != "note" for finding in record.findings) for record in searched + reported),
        dev=best.score if best else None, in_domain=_mean_score(reported, "in"), out_of_domain=_mean_score(reported, "out"),
    )  # fmt: skip


def _mean_score(records: Iterable[TrialRecord], domain: str) -> float | None:
    scores = []
    for record in records:
        selection = "best_dev" if "best_dev" in record.spec.selections else record.spec.selections[0]
        sets = [numbers for numbers in record.metrics.get(selection, {}).values() if numbers.domain == domain]
        scores += [sets[0].score] if sets else []  # the first set of a domain, as in the report's table
    return fmean(scores) if scores else None


def in_order(rows: Iterable[CellRow]) -> list[CellRow]:
    """Sort rows: cells with running trials first, then those with results, then those that wait; else in the plan's order."""
    return sorted(rows, key=lambda row: (not row.n_running, STAGES.index(row.stage)))


class _Column(NamedTuple):
    """A column of the table of cells; it is left out where `informative` is false of the rows."""

    title: str
    text: Callable[[CellRow], str]
    informative: Callable[[Sequence[CellRow]], bool] = lambda rows: True
    style: str = ""
    is_name: bool = False


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _mark(row: CellRow) -> str:
    if row.n_running:
        return "•"
    return {"done": "✓" if row.n_report else "✗"}.get(row.stage, "")


def _model(row: CellRow) -> str:  # the last part of a hub name or path: the rest rarely tells models apart, and is long
    return row.cell.base.model.name.rstrip("/").rpartition("/")[2]


_COLUMNS = (
    _Column("", _mark, is_name=True),
    _Column("model", _model, lambda rows: len({row.cell.base.model for row in rows}) > 1, is_name=True),
    _Column("task", lambda row: row.cell.base.task, lambda rows: len({row.cell.base.task for row in rows}) > 1, is_name=True),
    _Column("method", lambda row: row.cell.entry, is_name=True),
    _Column("shots", lambda row: str(row.cell.base.n_shots)),
    _Column("search", lambda row: f"{row.n_searched}/{row.n_search}" if row.n_search else "-"),
    _Column("report", lambda row: f"{row.n_reported}/{row.n_report}" if row.n_report else "-"),
    _Column("failed", lambda row: str(row.n_failed or ""), lambda rows: any(row.n_failed for row in rows), "red"),
    _Column("flagged", lambda row: str(row.n_flagged or ""), lambda rows: any(row.n_flagged for row in rows), "yellow"),
    _Column("dev %", lambda row: _percent(row.dev)),
    _Column("in %", lambda row: _percent(row.in_domain)),
    _Column("out %", lambda row: _percent(row.out_of_domain)),
)


def cells_table(rows: Sequence[CellRow], width: int, height: int) -> list[RenderableType]:
    """Return the table of cells, and a line with the number of those that do not fit into `height` lines."""
    rows, n_shown = in_order(rows), max(0, height - 2)  # the columns' titles and the line
    shown, hidden = (rows, []) if len(rows) <= n_shown + 1 else (rows[:n_shown], rows[n_shown:])
    columns = [column for column in _COLUMNS if column.informative(rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 1 if width < 100 else 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="left" if column.is_name else "right", no_wrap=not column.is_name)
    for row in shown:
        cells = [Text(column.text(row), column.style, no_wrap=True, overflow="ellipsis") for column in columns]
        table.add_row(*cells, style="bold" if row.n_running else "dim" if row.stage == "waiting" else "")
    stages = ", ".join(f"{n} {stage}" for stage, n in Counter(row.stage for row in hidden).items())
    more = Text(f"... and {len(hidden)} more cells: {stages}", "dim", no_wrap=True, overflow="ellipsis")
    return [table, more] if hidden else [table]
