"""Find what no single record can show, only all trials of a sweep together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from analysis.frames import CELL, differing_conditions, group_by, select
from llmft.config import ORACLES
from llmft.records import Finding, Manifest

if TYPE_CHECKING:
    import pandas as pd


N_SEEDS = 6
"""Fewer report seeds than this cannot reach p < .05 in a two-sided Wilcoxon signed-rank test."""

CROSS_CODES = {
    "unreadable_records": "records that could not be read, and are in no number",
    "missing_trials": "report trials of the sweep that left no record",
    "failed_search": "a cell without results, since every setting of its search failed",
    "no_report_trials": "the sweep has searched, but reported nothing yet",
    "failed_trials": "a cell whose mean leaves out failed trials",
    "no_selection": "finished trials without a checkpoint under the rule",
    "identical_draws": "different data seeds drew the same examples",
    "mixed_settings": "trials of one cell differ in more than their seeds",
    "mixed_test_sets": "trials of one task were scored on different test sets",
    "unbalanced_seeds": "cells that are compared have different numbers of trials",
    "few_seeds": f"fewer than {N_SEEDS} trials in a cell",
    "unequal_search": "cells were searched with different budgets",
    "oracle_selection": "the checkpoints were chosen by looking at the reported sets",
    "zero_shot_absent": "no zero-shot row to compare with",
}
"""Every code that `cross_findings` gives, and what it means."""


def cross_findings(frame: pd.DataFrame, rule: str = "best_dev", manifest: Manifest | None = None) -> list[Finding]:
    """Find what a careful reviewer would object to in the comparison as a whole.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`).
        manifest: from `analysis.read_manifest`; without it missing trials and search budgets are not checked.

    Returns:
        Findings with codes from `CROSS_CODES`; `value` is a count, or a share in [0, 1] for `failed_trials`. Messages name the cell.

    Raises:
        UserError: there is no such rule.
    """
    chosen = select(frame, rule)
    report = frame[(frame["stage"] == "report") & (frame["status"] != "unreadable")]
    trials = report.drop_duplicates("digest")
    findings = [*_of_store(frame, trials, manifest), *_of_cells(trials, chosen, rule), *_of_tasks(chosen, trials)]
    if manifest and len({choice.n_search_trials for choice in manifest.choices}) > 1:
        counts = [choice.n_search_trials for choice in manifest.choices]
        text = f"between {min(counts)} and {max(counts)} search trials a cell: a larger search finds better settings"
        findings.append(_warning("unequal_search", text))
    if rule in ORACLES:
        text = f"checkpoints chosen by '{rule}', which looks at the reported sets: these numbers are upper bounds, not results"
        findings.append(_warning("oracle_selection", text))
    return findings


def cell_name(cell: tuple[Any, ...]) -> str:
    """Name a cell in words: 'in_context, 16 shots, pattern minimal (opt-125m, rte)'."""
    model, task, method, n_shots, pattern = cell
    return f"{method}, {n_shots} shots, pattern {pattern} ({model}, {task})"


def _of_store(frame: pd.DataFrame, trials: pd.DataFrame, manifest: Manifest | None) -> Iterator[Finding]:
    unreadable = frame[frame["status"] == "unreadable"]
    if n := len(unreadable):
        yield _finding("unreadable_records", "error", f"{n} unreadable, in no number here; the first: {unreadable['message'].iloc[0]}", n)
    if manifest and (n_missing := manifest.n_report - len(set(manifest.report) & set(frame["digest"]))):
        text = f"{n_missing} of {manifest.n_report} report trials left no record: run the plan again"
        yield _warning("missing_trials", text, n_missing)
    for planned in manifest.cells if manifest else ():
        if not planned.n_report:
            name = cell_name(tuple(planned.cell.get(part) for part in CELL))
            yield _warning("failed_search", f"{name}: every setting that the search tried failed, so nothing is reported")
    if trials.empty:
        yield _warning("no_report_trials", f"no report trial yet ({frame['digest'].nunique()} other trials in the store)")


def _of_cells(trials: pd.DataFrame, chosen: pd.DataFrame, rule: str) -> Iterator[Finding]:
    trials = trials.assign(selected=trials["digest"].isin(chosen["digest"]))
    for cell, group in group_by(trials, CELL):
        name, n = cell_name(cell), len(group)
        if n_failed := int((group["status"] == "failed").sum()):
            causes = ", ".join(f"{cause} {count}" for cause, count in group["cause"].value_counts().items())
            rest = "; the mean is that of the others" if n_failed < n else ", so there is no mean"
            text = f"{name}: {n_failed} of {n} trials failed ({causes}){rest}"
            yield _warning("failed_trials", text, n_failed / n)
        if n_lost := int((~group["selected"]).sum()):
            text = f"{name}: {n_lost} finished trials have no '{rule}' checkpoint and are in no number here"
            yield _warning("no_selection", text, n_lost)
        drawn = group[group["shots_hash"].notna() & (group["n_shots"] > 0)]
        if n_same := int((drawn.groupby("shots_hash")["data_seed"].nunique() > 1).sum()):
            yield _warning("identical_draws", f"{name}: different data seeds drew the same examples ({n_same} draws recur)", n_same)
        if mixed := _mixed(group):
            yield _warning("mixed_settings", f"{name}: trials differ in {', '.join(mixed)}, and the row averages over them", len(mixed))


def _mixed(trials: pd.DataFrame) -> list[str]:
    return differing_conditions(lambda values: bool(values(trials).nunique(dropna=False) > 1))


def _of_tasks(chosen: pd.DataFrame, trials: pd.DataFrame) -> Iterator[Finding]:
    for (model, task), group in group_by(trials, ["model", "task"]):
        where = f"{model}, {task}"
        sizes = {cell: len(rows) for cell, rows in group_by(group[group["n_shots"] > 0], CELL)}
        smallest, largest = min(sizes.values(), default=0), max(sizes.values(), default=0)
        if smallest < largest:
            fewest, most = (next(cell_name(cell) for cell, size in sizes.items() if size == end) for end in (smallest, largest))
            text = f"from {smallest} trials ({fewest}) to {largest} ({most}): intervals differ for that alone"
            yield _warning("unbalanced_seeds", f"{where}: {text}", largest - smallest)
        if sizes and smallest < N_SEEDS:
            text = f"{where}: {smallest} trial{'s' * (smallest > 1)} in the smallest cell; {N_SEEDS} is the least that a paired test needs"
            yield _finding("few_seeds", "note", text, smallest)
        if "zero_shot" not in set(group["method"]):
            yield _finding("zero_shot_absent", "note", f"{where}: no zero_shot trials, so the table does not show what adapting adds")
    for (task,), scored in group_by(chosen[chosen["status"] == "finished"], ["task"]):
        if (n := len({_sizes(text) for text in scored["sets"].fillna("{}").unique()})) > 1:
            yield _warning("mixed_test_sets", f"{task}: trials were scored on {n} different choices or sizes of test sets", n)


def _sizes(sets: str) -> frozenset[tuple[str, int]]:
    return frozenset((name, shape["n"]) for name, shape in json.loads(sets).items())


def _finding(code: str, severity: str, message: str, value: float | None = None) -> Finding:
    return Finding(code=code, severity=severity, message=message, value=value)


def _warning(code: str, message: str, value: float | None = None) -> Finding:
    return _finding(code, "warning", message, value)
