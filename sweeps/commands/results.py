"""What takes results: the report, and one folder beside another."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmft.files import Place, open_folder
from sweeps.commands import terminal
from sweeps.imports import collector_off


def show_report(root: Place, rule: str = "best_dev") -> None:
    with collector_off():
        from analysis.findings import cross_findings
        from analysis.headline import answer_lines, headline
        from analysis.manifest import read_manifest
        from analysis.render import to_terminal
        from analysis.report import write_report
        from analysis.sampled import load_for_rule
        from analysis.tables import compare

    frame, unread = load_for_rule(root, rule)
    table, manifest = compare(frame, rule), read_manifest(root)
    console = terminal()
    console.print(to_terminal(table, cross_findings(frame, rule, manifest)))
    for line in answer_lines(headline(frame, rule, manifest)):
        console.print(line, markup=False, highlight=False)
    for problem in unread:
        print(f"llmft: {problem}", file=sys.stderr)
    print(f"Report: {write_report(root, rule=rule, frame=frame)}")


def report(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    rule: Annotated[
        str, typer.Option(help="which checkpoint counts: best_dev, last, ...; best_on_50: best on 50 out-of-domain examples")
    ] = "best_dev",
) -> int:
    """Write the tables and the report of results again.

    The table comes here, the report as HTML. Needs neither torch nor Ray.
    """
    show_report(open_folder(results), rule)
    return 0


def compare(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    other: Annotated[str, typer.Argument(help="another one, or 'mosbach2023': the published runs of Mosbach et al. 2023")],
    rule: Annotated[str, typer.Option(help="which checkpoint counts: best_dev, last, ...")] = "best_dev",
    other_rule: Annotated[str | None, typer.Option(help="the same for the other [default: --rule, or last]")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV, with everything it knows")] = False,
) -> int:
    """Two sets of results side by side, cell by cell, with a test.

    Needs neither torch nor Ray.
    """
    from analysis.beside import beside, beside_notes, beside_sheet, beside_title
    from analysis.published import SOURCES, load_results
    from analysis.sheets import sheet_to_terminal

    table = beside(load_results(results), load_results(other), rule, other_rule)
    if as_csv:
        print(table.to_csv(index=False), end="")
        return 0
    names = ("ours", other) if other in SOURCES else (results, other)
    console = terminal()
    console.print(sheet_to_terminal(beside_sheet(table, *names), beside_title(table, *names)))
    for note in beside_notes(table, *names):
        print(note)
    return 0
