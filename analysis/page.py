"""What the report says, section by section: everything that the page's templates need, as texts and tables of texts."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from analysis.beside import beside, beside_notes, beside_sheet, beside_title, short_name
from analysis.columns import DOMAINS
from analysis.contrasts import Family
from analysis.findings import CODES, cross_findings
from analysis.forgetting import forgetting_table
from analysis.headline import answer, main_family
from analysis.layout import TITLES, interval, lay_out, percent
from analysis.manifest import Manifest
from analysis.matrix import model_size, size_matrix
from analysis.matrix_render import MARKS, matrix_cells
from analysis.protocol import cost_sheet, facts, failure_sheet, provenance, search_sheet
from analysis.published import SOURCES, load_published, published_places
from analysis.ranking import difference_sheet, ranking
from analysis.selection import CELL, select
from analysis.sheets import Sheet, trimmed
from analysis.strips import draw_strips
from analysis.tables import common_shots
from llmft.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_OPEN_GROUPS = 6  # a grouping with more values than this is folded away


def page_content(
    frame: pd.DataFrame,
    rule: str,
    manifest: Manifest | None,
    comparison: pd.DataFrame,
    found: list[Family],
    groups: pd.DataFrame,
) -> dict[str, Any]:
    """Everything but what needs the folder itself (figures, single answers, the plan)."""
    blocks, footnotes = lay_out(comparison)
    commands = command_sheet(frame, rule)
    return {
        "title": (manifest.plan_name if manifest else "") or "Comparison of adaptation methods",
        "rule": rule,
        "answers": answer(comparison, found, rule),
        "blocks": list(zip(blocks, draw_strips(comparison), strict=True)),
        "footnotes": footnotes,
        "rankings": _rankings(found),
        "differences": difference_sheet(found),
        "groups": group_sheets(groups),
        "matrices": _matrices(frame, rule, comparison),
        "published": _published(frame, rule),
        "findings": cross_findings(frame, rule, manifest),
        "trial_findings": _trial_findings(frame, rule),
        "meanings": CODES,
        "failures": failure_sheet(frame),
        "commands": commands,
        "facts": facts(frame, rule),
        "search": search_sheet(manifest),
        "cost": cost_sheet(frame),
        "provenance": provenance(frame),
        "marks": MARKS,
    }


def example_sheet(table: pd.DataFrame) -> Sheet:
    """`analysis.example_contrasts` for a reader."""
    headers = ["model", "task", "shots", "set", "best", "other", "difference (95 %)", "seeds", "examples", "only best right",
               "only other right", "McNemar p < .05"]  # fmt: skip
    sheet = Sheet(headers, numeric=(2, 6, 7, 8, 9, 10, 11))
    pairs = {(row[side], row[f"{side}_pattern"]) for row in table.to_dict("records") for side in "ab"}
    several = {method for method, n in Counter(method for method, _ in pairs).items() if n > 1}
    for row in table.to_dict("records"):
        span = f"{percent(row['difference'])} ({percent(row['low'])} to {percent(row['high'])})"
        known = row["only_a"] == row["only_a"]
        counts = (
            [f"{row['only_a']:.0f}", f"{row['only_b']:.0f}", f"{row['n_mcnemar']:.0f} of {row['n_seeds']}"]
            if known
            else ["–"] * 3
        )
        sheet.rows.append([
            row["model"], row["task"], str(row["n_shots"]), row["set"], _name(row, "a", several), _name(row, "b", several), span, str(row["n_seeds"]), f"{row['n_examples']:,}", *counts,
        ])  # fmt: skip
    return trimmed(sheet, "model", "task")


def _name(row: dict[str, Any], side: str, several: set[str]) -> str:
    return f"{row[side]} ({row[f'{side}_pattern']})" if row[side] in several else row[side]


def forgetting_sheet(frame: pd.DataFrame) -> Sheet:
    """`analysis.forgetting_table` for a reader; no rows where nothing was measured beside the task."""
    names = ["model", "task", "method", "shots", "pattern"]
    sheet = Sheet(
        [*names, "measured on", "metric", "n", "before", "after", "drop (95 %)", "relative drop"], numeric=(3, 7, 8, 9, 10, 11)
    )
    for (*cell, _, name, metric), row in forgetting_table(frame).iterrows():
        span = "" if math.isnan(row["drop_low"]) else f" ({row['drop_low']:.3f} to {row['drop_high']:.3f})"
        numbers = [f"{row['n_trials']:.0f}", f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['drop']:.3f}{span}"]
        texts = [text.replace("-", "−") for text in [*numbers, f"{row['relative_drop']:.1%}"]]
        sheet.rows.append([*map(str, cell), name, metric, *texts])
    return trimmed(sheet, "model", "task", "pattern")


def variance_sheet(table: pd.DataFrame) -> Sheet:
    """`analysis.seed_variance` for a reader; no rows where all seeds vary together, for then there is nothing to attribute."""
    sheet = Sheet(
        ["model", "task", "method", "shots", "pattern", "n", "seed", "sd, points", "share of variance"], numeric=(3, 5, 7, 8)
    )
    if table["component"].nunique() > 2:
        for row in table.to_dict("records"):
            numbers = [percent(math.sqrt(row["variance"])), "–" if math.isnan(row["share"]) else f"{row['share']:.0%}"]
            sheet.rows.append(
                [*(str(row[name]) for name in CELL), str(row["n"]), row["component"].replace("+", ", "), *numbers]
            )
    return trimmed(sheet, "model", "task", "pattern")


def command_sheet(frame: pd.DataFrame, rule: str) -> Sheet:
    """For every cell, whatever became of its trials, the command that runs its first trial again, and which seeds there are."""
    trials = frame[(frame["stage"] == "report") & frame["command"].notna()].drop_duplicates("digest")
    sheet = Sheet(["model", "task", "method", "shots", "pattern", "seeds", "command of the first seed"], numeric=(3,))
    for (model, task, method, n_shots, pattern), of_cell in trials.groupby(CELL):
        of_cell = of_cell.sort_values("data_seed")
        seeds = ", ".join(str(seed) for seed in of_cell["data_seed"].unique())
        sheet.rows.append([model, task, method, str(n_shots), pattern, seeds, of_cell["command"].iloc[0]])
    return trimmed(sheet, "model", "task", "pattern", "seeds")


def group_sheets(groups: pd.DataFrame) -> list[dict[str, Any]]:
    """A table for each task, set and grouping: cells down, values of the grouping across."""
    sheets = []
    for (task, name, domain, group), of_group in groups.groupby(["task", "set", "domain", "group"], sort=False):
        names = list(of_group["value"].unique())
        sheet = Sheet(
            ["Model", "Method", "Shots", "Pattern", *(value.replace("_", " ") for value in names)],
            numeric=(2, *range(4, 4 + len(names))),
        )
        for (model, _, method, n_shots, pattern), of_cell in of_group.groupby(CELL, sort=False):
            texts = {row["value"]: interval(row["mean"], row["half_width"]) for row in of_cell.to_dict("records")}
            sheet.rows.append([model, method, str(n_shots), pattern, *(texts.get(value, "–") for value in names)])
        shown = {"sheet": trimmed(sheet, "model", "pattern"), "wide": len(names) > _OPEN_GROUPS}
        sheets.append({"task": task, "set": name, "domain": domain, "group": group, **shown})
    return sorted(sheets, key=lambda each: (each["domain"] != "out", each["wide"]))


def _rankings(found: list) -> list:
    places = dict.fromkeys((family.model, family.task, domain) for family in found for domain in DOMAINS)
    rankings = []
    for model, task, domain in places:
        here = [each for each in found if (each.model, each.task, each.domain) == (model, task, domain)]
        if here and len(main_family(here).samples) > 2:
            rankings.append(ranking(main_family(here)))
    return rankings


def _matrices(frame: pd.DataFrame, rule: str, comparison: pd.DataFrame) -> list[dict[str, Any]]:
    """In-context learning against each other method over all models, where there are several whose names tell a size."""
    rows = comparison[(comparison["n"].fillna(0) > 1) & (comparison["model"].map(model_size) < float("inf"))]
    matrices = []
    for task, of_task in rows.groupby("task"):
        n_shots = common_shots(of_task)
        cells = of_task[of_task["n_shots"] == n_shots]
        sides = cells.groupby(["method", "pattern"])["model"].nunique()
        prompted = [side for side, n in sides.items() if side[0] == "in_context" and n > 1]
        for row in prompted:
            for column in [side for side, n in sides.items() if side[0] != "in_context" and n > 1]:
                for domain in DOMAINS:
                    if matrix := _matrix(frame, rule, task, n_shots, row, column, domain):
                        matrices.append(matrix)
    return matrices


def _matrix(
    frame: pd.DataFrame, rule: str, task: str, n_shots: int, row: tuple, column: tuple, domain: str
) -> dict[str, Any] | None:
    sides = [{"method": method, "pattern": pattern} for method, pattern in (row, column)]
    try:
        matrix = size_matrix(frame, *sides, rule=rule, score=f"{domain}_score", task=task, n_shots=n_shots)
    except UserError:  # no score in this domain, or conditions that are mixed: the findings say so
        return None
    columns, rows = matrix_cells(matrix)
    names = [f"{method} ({pattern})" for method, pattern in (row, column)]
    title = f"{names[1]} minus {names[0]}, {task}, {n_shots} shots: {TITLES[domain].lower()}"
    return {"title": title, "columns": columns, "rows": rows, "row": names[0], "column": names[1]}


def _published(frame: pd.DataFrame, rule: str) -> list[dict[str, Any]]:
    """One's own cells beside the published ones, for each collection that has any of them."""
    found = []
    for name, source in SOURCES.items():
        ours = {(short_name(model), task) for model, task in frame[["model", "task"]].dropna().itertuples(index=False)}
        if not ours & {(short_name(model), task) for model, task in published_places(name)}:
            continue
        try:
            table = beside(frame, load_published(name), rule)
        except UserError:  # no cell in common: nothing to show
            continue
        names = ("ours", "published")
        shown = table[table["status"].isin(["both", "another set"])]
        notes = list(beside_notes(shown, *names))
        found.append(
            {"source": source, "title": beside_title(shown, *names), "sheet": beside_sheet(shown, *names), "notes": notes}
        )
    return found


def _trial_findings(frame: pd.DataFrame, rule: str) -> Sheet:
    """The findings that trials carry themselves: how many trials of each method, and what the first of them says."""
    counts: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], str] = {}
    chosen = select(frame, rule).dropna(subset=["finding_details", "method"])
    for method, details in zip(chosen["method"], chosen["finding_details"], strict=True):
        for key, message in {
            (each["severity"], each["code"], each["set"] or "", method): each["message"] for each in json.loads(details)
        }.items():
            counts[key] += 1
            first.setdefault(key, message)
    order = {"error": 0, "warning": 1, "note": 2}
    rows = sorted(counts, key=lambda key: (order[key[0]], -counts[key], key))
    headers = ["severity", "finding", "set", "method", "trials", "for example"]
    return Sheet(headers, [[*key, str(counts[key]), first[key]] for key in rows], numeric=(4,))
