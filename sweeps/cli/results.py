"""Commands that read results: the report, and the comparison of two folders."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sweeps.cli.options import ResultsName, Rule, read_folder, terminal
from sweeps.process import gc_paused

if TYPE_CHECKING:
    from llmft.records import StoragePath


def show_report(root: StoragePath, rule: str = "best_dev") -> None:
    """Print the table and the verdict of results, and write their report."""
    with gc_paused():
        from analysis.frames import load_for_rule
        from analysis.report import cross_findings, verdict_lines, write_report, write_verdicts
        from analysis.tables import compare, to_terminal
        from llmft.records import read_manifest

    frame, unread = load_for_rule(root, rule)
    table, manifest = compare(frame, rule), read_manifest(root)
    console = terminal()
    console.print(to_terminal(table, cross_findings(frame, rule, manifest)))
    for line in verdict_lines(write_verdicts(frame, rule, manifest)):
        console.print(line, markup=False, highlight=False)
    for problem in unread:
        print(f"llmft: {problem}", file=sys.stderr)
    print(f"Report: {write_report(root, rule=rule, frame=frame)}")


def report(results: ResultsName, rule: Rule = "best_dev") -> int:
    """Write the tables and the report of results again.

    The table comes here, the report as HTML. Needs neither torch nor Ray.
    """
    show_report(read_folder(results), rule)
    return 0


def compare(
    results: ResultsName,
    other: Annotated[str, typer.Argument(help="another one, or 'mosbach2023': the published runs of Mosbach et al. 2023")],
    rule: Rule = "best_dev",
    other_rule: Annotated[str | None, typer.Option(help="the same for the other [default: --rule, or last]")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV, with everything it knows")] = False,
) -> int:
    """Two sets of results side by side, cell by cell, with a test.

    Needs neither torch nor Ray.
    """
    from analysis.frames import SOURCES, load_results
    from analysis.tables import compare_runs, comparison_notes, comparison_table, comparison_title, table_to_terminal

    table = compare_runs(load_results(results), load_results(other), rule, other_rule)
    if as_csv:
        print(table.to_csv(index=False), end="")
        return 0
    names = ("ours", other) if other in SOURCES else (results, other)
    console = terminal()
    console.print(table_to_terminal(comparison_table(table, *names), comparison_title(table, *names)))
    for note in comparison_notes(table, *names):
        print(note)
    return 0
