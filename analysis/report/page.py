"""Collect what the report's page shows, section by section, as texts and tables of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.figures import draw_dot_plots
from analysis.frames import DOMAINS, SOURCES, common_shots, group_by, load_published, published_settings
from analysis.report.findings import CROSS_CODES
from analysis.report.verdict import verdicts_of
from analysis.stats import Family, main_family, model_size, size_matrix
from analysis.tables import (
    MARKS,
    TITLES,
    Ranking,
    build_blocks,
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
    families: list[Family],
    groups: pd.DataFrame,
    findings: list[Finding],
) -> dict[str, Any]:
    """Collect everything but what needs the folder itself (figures, single answers, the plan)."""
    blocks, footnotes = build_blocks(comparison)
    return {
        "title": (manifest.plan_name if manifest else "") or "Comparison of adaptation methods",
        "rule": rule,
        "verdicts": verdicts_of(comparison, families, rule, manifest, set(frame["digest"])),
        "blocks": list(zip(blocks, draw_dot_plots(comparison), strict=True)),
        "footnotes": footnotes,
        "rankings": _rankings(families),
        "differences": difference_table(families),
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


def _rankings(families: list[Family]) -> list[Ranking]:
    """Rank the methods of each model, task and domain, where there are more than two."""
    by_task: dict[tuple[str, str], dict[str, list[Family]]] = {}
    for family in families:
        by_task.setdefault((family.model, family.task), {}).setdefault(family.domain, []).append(family)
    main = [main_family(by_domain[domain]) for by_domain in by_task.values() for domain in DOMAINS if domain in by_domain]
    return [build_ranking(family) for family in main if len(family.samples) > 2]


def _matrices(frame: pd.DataFrame, rule: str, comparison: pd.DataFrame) -> list[dict[str, Any]]:
    """Compare in-context learning with each other method over all models, where several models have a size in their names."""
    rows = comparison[(comparison["n"].fillna(0) > 1) & (comparison["model"].map(model_size) < float("inf"))]
    matrices = []
    for (task,), of_task in group_by(rows, ["task"]):
        n_shots = common_shots(of_task)
        cells = of_task[of_task["n_shots"] == n_shots]
        sides = [side for side, of_side in group_by(cells, ["method", "pattern"]) if of_side["model"].nunique() > 1]
        for row in [side for side in sides if side[0] == "in_context"]:
            for column in [side for side in sides if side[0] != "in_context"]:
                for domain in DOMAINS:
                    if matrix := _matrix(frame, rule, task, n_shots, row, column, domain):
                        matrices.append(matrix)
    return matrices


def _matrix(
    frame: pd.DataFrame, rule: str, task: str, n_shots: int, row: tuple[Any, ...], column: tuple[Any, ...], domain: str
) -> dict[str, Any] | None:
    sides = [dict(zip(("method", "pattern"), side, strict=True)) for side in (row, column)]
    try:
        matrix = size_matrix(frame, sides[0], sides[1], rule, f"{domain}_score", task=task, n_shots=n_shots)
    except UserError:  # no score in this domain, or conditions that are mixed: the findings say so
        return None
    columns, rows = matrix_cells(matrix)
    names = [f"{method} ({pattern})" for method, pattern in (row, column)]
    title = f"{names[1]} minus {names[0]}, {task}, {n_shots} shots: {TITLES[domain].lower()}"
    return {"title": title, "columns": columns, "rows": rows, "row": names[0], "column": names[1]}


def _published(frame: pd.DataFrame, rule: str) -> list[dict[str, Any]]:
    """Compare one's own cells with the published ones, for each collection that has any of them."""
    sections = []
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
        section = {"source": source, "title": comparison_title(shown, *names), "table": comparison_table(shown, *names), "notes": notes}
        sections.append(section)
    return sections
