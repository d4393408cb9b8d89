"""Turn frames into tables of texts for the report: single answers, forgetting, seeds, commands, groups, findings."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from analysis.frames import CELL, group_by, select
from analysis.stats import FEWEST
from analysis.tables.forgetting import forgetting_table
from analysis.tables.formatting import interval, percent
from analysis.tables.text_table import TextTable, trim_columns

if TYPE_CHECKING:
    import pandas as pd


_HUGE = 1e9
_FEW = 6  # a grouping with more values than this makes a wide table


def example_table(contrasts: pd.DataFrame) -> TextTable:
    """Show the frame of `analysis.example_contrasts`."""
    headers = ["model", "task", "shots", "set", "best", "other", "difference (95 %)", "seeds", "examples", "only best right",
               "only other right", "McNemar p < .05"]  # fmt: skip
    table = TextTable(headers, numeric=(2, 6, 7, 8, 9, 10, 11))
    pairs = {(row[side], row[f"{side}_pattern"]) for row in contrasts.to_dict("records") for side in "ab"}
    several = {method for method, n in Counter(method for method, _ in pairs).items() if n > 1}
    for row in contrasts.to_dict("records"):
        span = percent(row["difference"])
        if not math.isnan(row["low"]):
            span += f" ({percent(row['low'])} to {percent(row['high'])})"
        known = row["only_a"] == row["only_a"]
        counts = [f"{row['only_a']:.0f}", f"{row['only_b']:.0f}", f"{row['n_mcnemar']:.0f} of {row['n_seeds']}"] if known else ["–"] * 3
        table.rows.append([
            row["model"], row["task"], str(row["n_shots"]), row["set"], _name(row, "a", several), _name(row, "b", several), span,
            str(row["n_seeds"]), f"{row['n_examples']:,}", *counts,
        ])  # fmt: skip
    return trim_columns(table, "model", "task")


def _name(row: Mapping[Hashable, Any], side: str, several: set[str]) -> str:
    return f"{row[side]} ({row[f'{side}_pattern']})" if row[side] in several else row[side]


def forgetting_text_table(frame: pd.DataFrame) -> TextTable:
    """Show the table of `analysis.forgetting_table`; no rows where nothing was measured beside the task."""
    names = ["model", "task", "method", "shots", "pattern"]
    table = TextTable(
        [*names, "measured on", "metric", "n", "before", "after", "drop (95 %)", "relative drop"], numeric=(3, 7, 8, 9, 10, 11)
    )
    for row in forgetting_table(frame).reset_index().to_dict("records"):
        spans = row["n_trials"] >= FEWEST and abs(row["drop"]) <= _HUGE
        span = f" ({_number(row['drop_low'])} to {_number(row['drop_high'])})" if spans else ""
        numbers = [f"{row['n_trials']:.0f}", _number(row["before"]), _number(row["after"]), _number(row["drop"]) + span]
        relative = f"{row['relative_drop']:.1%}" if abs(row["relative_drop"]) < _HUGE else _number(row["relative_drop"])
        texts = [text.replace("-", "−") for text in [*numbers, relative]]
        table.rows.append([*(str(row[column]) for column in [*CELL, "name", "metric"]), *texts])
    return trim_columns(table, "model", "task", "pattern")


def _number(value: float) -> str:
    """Format with three decimals; a perplexity too large to print as a bound."""
    return f"{value:.3f}" if abs(value) <= _HUGE else "> 1e9" if value > 0 else "< -1e9"


def variance_table(components: pd.DataFrame) -> TextTable:
    """Show the frame of `analysis.seed_variance`; no rows where all seeds vary together, since there is nothing to attribute."""
    table = TextTable(["model", "task", "method", "shots", "pattern", "n", "seed", "sd, points", "share of variance"], numeric=(3, 5, 7, 8))
    if components["component"].nunique() > 2:
        for row in components.to_dict("records"):
            numbers = [percent(math.sqrt(row["variance"])), "–" if math.isnan(row["share"]) else f"{row['share']:.0%}"]
            table.rows.append([*(str(row[name]) for name in CELL), str(row["n"]), row["component"].replace("+", ", "), *numbers])
    return trim_columns(table, "model", "task", "pattern")


def command_table(frame: pd.DataFrame) -> TextTable:
    """List the seeds of every cell, finished or not, with the digest of the first trial and the command that runs it again.

    A dash stands for a trial that the command line cannot express, such as one of a task that the plan defines.
    """
    trials = frame[frame["stage"] == "report"].drop_duplicates("digest")
    table = TextTable(["model", "task", "method", "shots", "pattern", "seeds", "digest of the first", "its command"], numeric=(3,))
    for cell, of_cell in group_by(trials, CELL):
        of_cell = of_cell.sort_values("data_seed")
        seeds = ", ".join(str(seed) for seed in of_cell["data_seed"].unique())
        first = of_cell.iloc[0]
        command = first["command"] if isinstance(first["command"], str) else "–"
        table.rows.append([*map(str, cell), seeds, first["digest"], command])
    return trim_columns(table, "model", "task", "pattern", "seeds")


def group_tables(groups: pd.DataFrame) -> list[dict[str, Any]]:
    """Build a table for each task, set and grouping: cells down, values of the grouping across."""
    tables = []
    for (task, name, domain, group), of_group in group_by(groups, ["task", "set", "domain", "group"], sort=False):
        names = list(of_group["value"].unique())
        table = TextTable(
            ["Model", "Method", "Shots", "Pattern", *(value.replace("_", " ") for value in names)],
            numeric=(2, *range(4, 4 + len(names))),
        )
        for (model, _, method, n_shots, pattern), of_cell in group_by(of_group, CELL, sort=False):
            texts = {row["value"]: interval(row["mean"], row["half_width"]) for row in of_cell.to_dict("records")}
            table.rows.append([model, method, str(n_shots), pattern, *(texts.get(value, "–") for value in names)])
        shown = {"table": trim_columns(table, "model", "pattern"), "wide": len(names) > _FEW}
        tables.append({"task": task, "set": name, "domain": domain, "group": group, **shown})
    return sorted(tables, key=lambda shown: (shown["domain"] != "out", shown["wide"]))


def trial_finding_table(frame: pd.DataFrame, rule: str) -> TextTable:
    """Count the findings in the records: how many trials of each method, and the message of the first."""
    counts: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], str] = {}
    chosen = select(frame, rule).dropna(subset=["finding_details", "method"])
    for method, details in zip(chosen["method"], chosen["finding_details"], strict=True):
        findings = json.loads(details)
        messages = {(finding["severity"], finding["code"], finding["set"] or "", method): finding["message"] for finding in findings}
        for key, message in messages.items():
            counts[key] += 1
            first.setdefault(key, message)
    order = {"error": 0, "warning": 1, "note": 2}
    rows = sorted(counts, key=lambda key: (order[key[0]], -counts[key], key))
    headers = ["severity", "finding", "set", "method", "trials", "for example"]
    return TextTable(headers, [[*key, str(counts[key]), first[key]] for key in rows], numeric=(4,))
