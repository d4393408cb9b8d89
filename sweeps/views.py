"""Tables for the terminal: a plan before it runs, one trial's record, the methods and the tasks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmft.method import Range
from llmft.record import TrialRecord
from sweeps.prune import failed
from sweeps.schedule import CellState, Planned, Records


def _table(*columns: str, n_left: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < n_left else "right", overflow="fold")
    return table


def plan_table(states: Iterable[CellState]) -> Table:
    """One row a cell: its trials by stage, new, done and failed."""
    table = _table(
        "model", "task", "method", "shots", "pattern", "searched", "search", "report", "done", "failed", "new", n_left=3
    )
    for state in states:
        cell = state.cell
        table.add_row(
            cell.base.model.name, cell.base.task, cell.entry, str(cell.base.n_shots), cell.base.pattern,
            ", ".join(cell.ranges) or "-", str(state.n_search), str(state.n_report) if not state.failed else "search failed",
            str(state.n_done - state.n_failed), str(state.n_failed), str(state.total - state.n_done),
        )  # fmt: skip
    return table


def count_by_stage(states: Iterable[CellState], records: Records) -> dict[str, tuple[int, int, int]]:
    """stage -> (new, done, failed) trials."""
    totals, states = {}, list(states)
    still_open = {trial.digest for state in states for trial in state.open}
    for stage, expected in (("search", sum(s.n_search for s in states)), ("report", sum(s.n_report for s in states))):
        trials: list[Planned] = [trial for state in states for trial in getattr(state, stage)]
        ended = [records[trial.digest] for trial in trials if trial.digest not in still_open]
        n_failed = sum(map(failed, ended))
        totals[stage] = expected - len(ended), len(ended) - n_failed, n_failed
    return totals


def record_summary(record: TrialRecord) -> RenderableType:
    """One trial: its numbers by checkpoint and set, its findings and its cost."""
    spec, parts = record.spec, []
    parts.append(
        Text(
            f"{spec.model.name} on {spec.task} with {spec.method}, {spec.n_shots} shots, seed {spec.data_seed} ({record.digest})",
            style="bold",
        )
    )
    if not record.finished:
        parts.append(Text(f"failed, {record.cause}: {record.message}", style="red"))
        return Group(*parts)
    table = _table("checkpoint", "set", "accuracy %", "majority %", "macro-F1", "MCC", "rows", n_left=2)
    for selection, accuracy in record.dev_accuracy.items():
        table.add_row(selection, "dev", f"{100 * accuracy:.1f}", "", "", "", str(len(record.draws.dev)))
    for selection, sets in record.metrics.items():
        for name, numbers in sets.items():
            domain = "" if numbers.domain == "in" else " (OOD)"
            table.add_row(
                selection, name + domain, f"{100 * numbers.accuracy:.1f}", f"{100 * numbers.majority_share:.1f}",
                f"{numbers.macro_f1:.3f}", f"{numbers.mcc:.3f}", str(numbers.n),
            )  # fmt: skip
    parts.append(table)
    for finding in record.findings:
        where = f" [{finding.set}{', ' + finding.selection if finding.selection else ''}]" if finding.set else ""
        parts.append(
            Text(
                f"{finding.severity}: {finding.code}{where}: {finding.message}",
                style="yellow" if finding.severity != "note" else "dim",
            )
        )
    if record.cost:
        cost = record.cost
        parts.append(
            Text(
                f"{cost.wall_s:.1f} s on {cost.device}, peak {cost.peak_memory_bytes / 2**20:.0f} MiB, "
                f"{cost.n_trainable_parameters:,} of {cost.n_parameters:,} parameters trained, {cost.tokens_per_query:.0f} tokens a query"
            )
        )
    return Group(*parts)


def range_text(span: Range) -> str:
    """`1e-05 to 0.01, log` or `one of 4, 8`, and under which condition."""
    if span.choices:
        text = f"one of {', '.join(map(str, span.choices))}"
    else:
        text = f"{span.low:g} to {span.high:g}{', log' if span.log else ''}{', whole numbers' if span.integer else ''}"
    return text + "".join(f", where {name} is {' or '.join(map(str, values))}" for name, values in span.when.items())


def methods_table(names: Iterable[str]) -> Table:
    """Every method: what it trains, its settings and what a sweep searches."""
    from llmft.registry import method_class

    table = _table("method", "what it does", "trains", "settings", "searched", "source", n_left=6)
    for name in names:
        cls = method_class(name)
        settings = cls.Settings().model_dump(mode="json")
        table.add_row(
            name,
            _first_sentence(cls),
            "yes" if cls.trains else "no",
            "\n".join(f"{key}: {value}" for key, value in settings.items()) or "-",
            "\n".join(f"{key}: {range_text(span)}" for key, span in cls.search.items()) or "-",
            cls.paper or "-",
        )
    return table


def tasks_table(names: Iterable[str]) -> Table:
    """Every task: its labels, test sets and patterns."""
    from llmft.registry import load_task

    table = _table("task", "what it is", "labels", "in domain", "out of domain", "patterns", "data", n_left=7)
    for name in names:
        task = load_task(name)
        table.add_row(
            name, _first_sentence(type(task)), ", ".join(task.labels), task.in_domain, "\n".join(task.out_of_domain) or "-",
            "\n".join(task.patterns), "hub or --data-dir" if task.needs_data else "built in",
        )  # fmt: skip
    return table


def _first_sentence(cls: type) -> str:
    text = " ".join((sys.modules[cls.__module__].__doc__ or "").split())
    return re.sub(r" \([^()]*\d{4}[^()]*\)", "", text).split(". ")[0].rstrip(".")  # without its sources
