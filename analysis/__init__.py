"""Records to frames, statistics, tables, figures and a report. Runs anywhere: it needs neither torch nor Ray.

    frame = analysis.load("results")                    # one row for each trial and selection; or a data frame of one's own
    rich.print(analysis.to_terminal(analysis.compare(frame), analysis.cross_findings(frame)))
    analysis.contrast_table(frame)                      # methods against each other, paired by seed
    analysis.write_report("results")                    # results/report/report.html
    analysis.compare_runs(frame, analysis.load_published())   # one's own results beside Mosbach et al. 2023

pandas, matplotlib and scipy are imported by the functions that need them, so that importing the package stays cheap.
"""

from analysis.frames.external import from_dataframe
from analysis.frames.loading import load
from analysis.frames.published import load_published
from analysis.frames.selection import select
from analysis.report.build import write_report
from analysis.report.findings import cross_findings
from analysis.stats.comparisons import contrast_table
from analysis.stats.examples import example_contrasts
from analysis.stats.matrix import size_matrix
from analysis.stats.variance import seed_variance
from analysis.tables.comparison import compare
from analysis.tables.forgetting import forgetting_table
from analysis.tables.render import to_terminal
from analysis.tables.side_by_side import compare_runs

__all__ = [
    "compare",
    "compare_runs",
    "contrast_table",
    "cross_findings",
    "example_contrasts",
    "forgetting_table",
    "from_dataframe",
    "load",
    "load_published",
    "seed_variance",
    "select",
    "size_matrix",
    "to_terminal",
    "write_report",
]
