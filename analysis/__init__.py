"""Records to frames, tables, a figure and a report. Runs anywhere: it needs neither torch nor Ray.

    frame = analysis.load("results")                    # one row for each trial and selection
    rich.print(analysis.to_terminal(analysis.compare(frame), analysis.cross_findings(frame)))
    analysis.write_report("results")                    # results/report/report.html

pandas, matplotlib and scipy are imported by the functions that need them, so that importing the package stays cheap.
"""

from analysis.columns import COLUMNS, Column
from analysis.figures import scatter
from analysis.findings import CODES, cross_findings
from analysis.forgetting import forgetting_table, load_forgetting, mean_relative_drop
from analysis.frame import load, predictions
from analysis.headline import Answer, headline
from analysis.manifest import Choice, Manifest, read_manifest
from analysis.render import to_csv, to_markdown, to_terminal
from analysis.report import write_report
from analysis.selection import RULES, select
from analysis.tables import CELL, compare, compare_groups

__all__ = [
    "CELL",
    "CODES",
    "COLUMNS",
    "RULES",
    "Answer",
    "Choice",
    "Column",
    "Manifest",
    "compare",
    "compare_groups",
    "cross_findings",
    "forgetting_table",
    "headline",
    "load",
    "load_forgetting",
    "mean_relative_drop",
    "predictions",
    "read_manifest",
    "scatter",
    "select",
    "to_csv",
    "to_markdown",
    "to_terminal",
    "write_report",
]
