"""What the report says, section by section: everything that the page's templates need, as texts and tables of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.figures import draw_dot_plots
from analysis.frames import DOMAINS, SOURCES, common_shots, load_published, published_settings
from analysis.report.findings import CROSS_CODES
from analysis.report.verdict import main_family, verdict_of
from analysis.stats import Family, model_size, size_matrix
from analysis.tables import (
    MARKS,
    TITLES,
    build_ranking,
    command_table,
    compare_runs,
    comparison_notes,
    comparison_table,
    comparison_title,
    cost_table,
    difference_table,
    facts,
    failure_table,
    group_tables,
    lay_out,
    matrix_cells,
    provenance,
    search_table,
    short_name,
    trial_finding_table,
)
from llmft.errors import UserError
from llmft.records import Finding, Manifest

if TYPE_CHECKING:
    import pandas as pd


def page_content(
    frame: pd.DataFrame,
    rule: str,
    manifest: Manifest | None,
    comparison: pd.DataFrame,
    found: list[Family],
    groups: pd.DataFrame,
    findings: list[Finding],
) -> dict[str, Any]:
    """Everything but what needs the folder itself (figures, single answers, the plan)."""
    blocks, footnotes = lay_out(comparison)
    return {
        "title": (manifest.plan_name if manifest else "") or "Comparison of adaptation methods",
        "rule": rule,
        "answers": verdict_of(comparison, found, rule, manifest, set(frame["digest"])),
        "blocks": list(zip(blocks, draw_dot_plots(comparison), strict=True)),
        "footnotes": footnotes,
        "rankings": _rankings(found),
        "differences": difference_table(found),
        "groups": group_tables(groups),
        "matrices": _matrices(frame, rule, comparison),
        "published": _published(frame, rule),
        "findings": findings,
        "trial_findings": trial_finding_table(frame, rule),
        "meanings": CROSS_CODES,
        "failures": failure_table(frame),
        "commands": command_table(frame),
        "facts": facts(frame, rule),
        "search": search_table(manifest),
        "cost": cost_table(frame),
        "provenance": provenance(frame),
        "marks": MARKS,
    }


def _rankings(found: list) -> list:
    places = dict.fromkeys((family.model, family.task, domain) for family in found for domain in DOMAINS)
    rankings = []
    for model, task, domain in places:
        here = [each for each in found if (each.model, each.task, each.domain) == (model, task, domain)]
        if here and len(main_family(here).samples) > 2:
            rankings.append(build_ranking(main_family(here)))
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


def _matrix(frame: pd.DataFrame, rule: str, task: str, n_shots: int, row: tuple, column: tuple, domain: str) -> dict[str, Any] | None:
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
        if not ours & {(short_name(model), task) for model, task in published_settings(name)}:
            continue
        try:
            table = compare_runs(frame, load_published(name), rule)
        except UserError:  # no cell in common: nothing to show
            continue
        names = ("ours", "published")
        shown = table[table["status"].isin(["both", "another set"])]
        notes = list(comparison_notes(shown, *names))
        found.append({"source": source, "title": comparison_title(shown, *names), "sheet": comparison_table(shown, *names), "notes": notes})
    return found
