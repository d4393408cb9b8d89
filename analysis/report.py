"""The report: one HTML file that needs nothing beside it, with the tables and the figure also as files of their own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.findings import CODES, cross_findings
from analysis.frame import load
from analysis.headline import headline
from analysis.layout import interval, lay_out
from analysis.manifest import read_manifest
from analysis.protocol import Sheet, cost_sheet, facts, failure_sheet, provenance, search_sheet
from analysis.render import to_csv, to_markdown
from analysis.selection import CELL, select
from analysis.strips import draw_strips
from analysis.tables import compare, compare_groups
from llmft.errors import UserError
from llmft.files import Place, open_folder, reason, write_atomically

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).parent / "templates"
_OPEN_GROUPS = 6  # a grouping with more values than this is folded away


def write_report(
    root: str | Place, out: str | Place | None = None, rule: str = "best_dev", frame: pd.DataFrame | None = None
) -> Place:
    """Write the report on the results in `root`.

    Beside `report.html` it writes `tables/comparison.md`, `tables/comparison.csv`, `tables/groups.csv` and `figures/scatter.svg`.
    Each file is replaced in one step; the same records give the same bytes.

    Args:
        root: the results of a sweep, as for `analysis.load`.
        out: the folder to write to, or its URL; None: `<root>/report`.
        rule: which checkpoint counts (`analysis.RULES`).
        frame: `analysis.load(root)`, where the caller has it already.

    Returns:
        Where `report.html` lies.

    Raises:
        UserError: no folder, no records, a damaged manifest, no such rule; the report cannot be written.
    """
    from analysis.figures import scatter

    root = open_folder(root)
    folder = open_folder(out) if out is not None else root / "report"
    frame, manifest = load(root) if frame is None else frame, read_manifest(root)
    comparison, groups = compare(frame, rule), compare_groups(frame, rule)
    found, figure = cross_findings(frame, rule, manifest), scatter(frame, rule)
    blocks, footnotes = lay_out(comparison)
    page = _render(
        title=(manifest.plan_name if manifest else "") or "Comparison of adaptation methods",
        answers=headline(frame, rule),
        blocks=list(zip(blocks, draw_strips(comparison), strict=True)),
        footnotes=footnotes,
        groups=_group_sheets(groups),
        figure=figure,
        findings=found,
        trial_findings=_trial_findings(frame, rule),
        meanings=CODES,
        failures=failure_sheet(frame),
        facts=facts(frame, rule),
        search=search_sheet(manifest),
        cost=cost_sheet(frame),
        provenance=provenance(frame),
        plan=_plan(root),
    )
    files = {
        "tables/comparison.md": to_markdown(comparison, found),
        "tables/comparison.csv": to_csv(comparison),
        "tables/groups.csv": to_csv(groups),
        "figures/scatter.svg": figure,
        "report.html": page,  # last: when it is there, so is what lies beside it
    }
    try:
        for name, content in files.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({reason(error)}).") from None
    return folder / "report.html"


def _plan(root: Place) -> str:
    try:
        return (root / "plan.yaml").read_text(errors="replace")
    except OSError:
        return ""  # results need no plan to be reported


def _render(figure: str, **content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(figure=Markup(figure), **content)  # the figure escapes its own texts


def _group_sheets(groups: pd.DataFrame) -> list[dict[str, Any]]:
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
        sheets.append(
            {"task": task, "set": name, "domain": domain, "group": group, "sheet": sheet, "open": len(names) <= _OPEN_GROUPS}
        )
    return sorted(sheets, key=lambda each: (each["domain"] != "out", not each["open"]))


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
