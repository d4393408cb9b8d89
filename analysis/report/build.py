"""Build the report: one self-contained HTML file, with the tables and the figures also as files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.frames import load_curves, load_for_rule
from analysis.report.findings import cross_findings
from analysis.report.page import page_content
from analysis.stats import Family, budget_curves, build_families, contrast_table, costs, example_contrasts, seed_variance
from analysis.tables import (
    compare,
    compare_groups,
    example_table,
    forgetting_text_table,
    load_forgetting,
    to_csv,
    to_latex,
    to_markdown,
    variance_table,
)
from llmft.errors import UserError
from llmft.records import Finding, Manifest, StoragePath, open_folder, read_manifest, reason, write_atomically

if TYPE_CHECKING:
    import pandas as pd


TEMPLATES = Path(__file__).parents[1] / "templates"

FIGURES = {
    "scatter": "Every trial, in domain against out of domain",
    "shots": "Score against the number of shots",
    "sizes": "Score against the size of the model",
    "sets": "Accuracy by set and label: a shortcut is right on one label and wrong on the other",
    "cost": "Out-of-domain score against the tokens of a query; the line joins what nothing beats on both",
    "curves": "Dev score during training, mean and 95 % interval over the report trials; one that ended early stays at its last score",
    "rates": "Dev score of what the search tried, against the learning rate",
    "budget": "Expected best dev score against the number of settings tried (Dodge et al. 2019)",
}
"""Name of a figure -> what it shows."""


def write_report(
    root: str | StoragePath, out: str | StoragePath | None = None, rule: str = "best_dev", frame: pd.DataFrame | None = None
) -> StoragePath:
    """Write the report on the results in `root`.

    Beside `report.html` it writes `tables/` (the comparison as Markdown, LaTeX, for a page and for a column, and CSV; groups,
    contrasts, single answers, search budget and costs as CSV) and `figures/` (SVG). Each file is replaced in one
    step; the same records give the same bytes.

    Args:
        root: the results of a sweep, as for `analysis.load`.
        out: the folder to write to, or its URL; None: `<root>/report`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`, or 'best_on_<n>').
        frame: `analysis.load(root)`, where the caller has it already.

    Returns:
        Where `report.html` lies.

    Raises:
        UserError: no folder, no records, a damaged manifest, no such rule; the report cannot be written.
    """
    root = open_folder(root)
    folder = open_folder(out) if out is not None else root / "report"
    if frame is None:
        frame, _ = load_for_rule(root, rule)
    results = _compute(root, frame, rule)
    _write(folder, _table_files(results) | _figure_files(results) | {"report.html": _page(root, results)})
    return folder / "report.html"


class _Results(NamedTuple):
    """What the report shows, computed once: for the page and for the files beside it."""

    frame: pd.DataFrame
    rule: str
    manifest: Manifest | None
    families: list[Family]
    findings: list[Finding]
    comparison: pd.DataFrame
    groups: pd.DataFrame
    examples: pd.DataFrame
    unread: list[str]
    variance: pd.DataFrame
    figures: dict[str, str]


def _compute(root: StoragePath, frame: pd.DataFrame, rule: str) -> _Results:
    manifest, families = read_manifest(root), build_families(frame, rule)
    findings = cross_findings(frame, rule, manifest)
    comparison, groups = compare(frame, rule, families), compare_groups(frame, rule)
    examples, unread = example_contrasts(root, frame, rule)
    variance = seed_variance(frame, rule, "out_of_domain_score" if frame["out_of_domain_score"].notna().any() else "in_domain_score")
    figures = draw_figures(frame, load_curves(root, frame), rule, comparison, groups)
    return _Results(frame, rule, manifest, families, findings, comparison, groups, examples, unread, variance, figures)


def _page(root: StoragePath, results: _Results) -> str:
    return _render(
        **page_content(
            results.frame, results.rule, results.manifest, results.comparison, results.families, results.groups, results.findings
        ),
        examples=example_table(results.examples),
        unread=results.unread,
        forgetting=forgetting_text_table(load_forgetting(root)),
        variance=variance_table(results.variance),
        plan=_plan(root),
        figures=results.figures,
    )


def _table_files(results: _Results) -> dict[str, str]:
    comparison, findings = results.comparison, results.findings
    return {
        "tables/comparison.md": to_markdown(comparison, findings),
        "tables/comparison.tex": to_latex(comparison, findings),
        "tables/comparison_narrow.tex": to_latex(comparison, findings, narrow=True),
        "tables/comparison.csv": to_csv(comparison),
        "tables/groups.csv": to_csv(results.groups),
        "tables/contrasts.csv": to_csv(contrast_table(results.frame, results.rule, results.families)),
        "tables/examples.csv": to_csv(results.examples),
        "tables/budget.csv": to_csv(budget_curves(results.frame)),
        "tables/costs.csv": to_csv(costs(results.frame, results.rule)),
        "tables/seed_variance.csv": to_csv(results.variance),
    }


def _figure_files(results: _Results) -> dict[str, str]:
    return {f"figures/{name}.svg": figure for name, figure in results.figures.items()}


def _write(folder: StoragePath, files: dict[str, str]) -> None:
    """Write each file (name -> content), in their order: when `report.html`, the last, is there, so are the others."""
    try:
        for name, content in files.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({reason(error)}).") from None


def draw_figures(
    frame: pd.DataFrame,
    curves: pd.DataFrame,
    rule: str = "best_dev",
    comparison: pd.DataFrame | None = None,
    groups: pd.DataFrame | None = None,
) -> dict[str, str]:
    """Draw every figure of `FIGURES` as an SVG element, by name.

    Args:
        curves: from `analysis.frames.load_curves`.
        comparison, groups: `analysis.compare(frame, rule)` and `analysis.compare_groups(frame, rule)`, where the caller has them.
    """
    from analysis.figures import results as figures
    from analysis.figures import training as training_figures

    comparison = compare(frame, rule) if comparison is None else comparison
    groups = compare_groups(frame, rule) if groups is None else groups

    return {
        "scatter": figures.scatter(frame, rule),
        "shots": figures.shots_figure(frame, comparison),
        "sizes": figures.sizes_figure(frame, comparison),
        "sets": figures.sets_figure(frame, groups),
        "cost": figures.cost_figure(frame, rule),
        "curves": training_figures.learning_curves(frame, curves),
        "rates": training_figures.rates_figure(frame),
        "budget": training_figures.budget_figure(frame),
    }


def _plan(root: StoragePath) -> str:
    try:
        return (root / "plan.yaml").read_text(errors="replace")
    except OSError:
        return ""  # results need no plan to be reported


def _render(figures: dict[str, str], **content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = {name: Markup(svg) for name, svg in figures.items()}  # a figure escapes its own texts
    return environment.get_template("report.html").render(figures=drawn, captions=FIGURES, **content)
