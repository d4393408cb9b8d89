"""Records to frames, statistics, tables, figures and a report. Runs anywhere: it needs neither torch nor Ray.

    frame = analysis.load("results")                    # one row for each trial and selection; or a data frame of one's own
    rich.print(analysis.to_terminal(analysis.compare(frame), analysis.cross_findings(frame)))
    analysis.contrast_table(frame)                      # methods against each other, paired by seed
    analysis.write_report("results")                    # results/report/report.html
    analysis.beside(frame, analysis.load_published())   # one's own results beside Mosbach et al. 2023

pandas, matplotlib and scipy are imported by the functions that need them, so that importing the package stays cheap.
"""

from analysis.agreement import rule_agreement
from analysis.beside import beside, beside_sentences, beside_sheet
from analysis.budget import budget_curves, costs, search_points
from analysis.columns import COLUMNS, Column
from analysis.contrasts import contrast_table, families
from analysis.curves import load_curves
from analysis.examples import example_contrasts, example_scores
from analysis.figures import scatter
from analysis.findings import CODES, cross_findings
from analysis.forgetting import forgetting_table, load_forgetting, mean_relative_drop
from analysis.frame import load, predictions
from analysis.headline import Answer, headline
from analysis.manifest import Choice, Manifest, read_manifest
from analysis.matrix import size_matrix
from analysis.matrix_render import matrix_to_latex, matrix_to_markdown, matrix_to_terminal
from analysis.own import own_frame
from analysis.published import SOURCES, load_published, load_results
from analysis.render import to_csv, to_latex, to_markdown, to_terminal
from analysis.report import FIGURES, draw_figures, write_report
from analysis.sampled import best_on_examples, load_for_rule, sample_agreement
from analysis.selection import CELL, RULES, choose, select
from analysis.stats import (
    bootstrap_difference,
    expected_best,
    holm,
    indistinct_groups,
    mcnemar,
    minimum_detectable_effect,
    variance_components,
    welch,
)
from analysis.tables import compare, compare_groups
from analysis.variance import seed_variance

__all__ = [
    "CELL",
    "CODES",
    "COLUMNS",
    "FIGURES",
    "RULES",
    "SOURCES",
    "Answer",
    "Choice",
    "Column",
    "Manifest",
    "beside",
    "beside_sentences",
    "beside_sheet",
    "best_on_examples",
    "bootstrap_difference",
    "budget_curves",
    "choose",
    "compare",
    "compare_groups",
    "contrast_table",
    "costs",
    "cross_findings",
    "draw_figures",
    "example_contrasts",
    "example_scores",
    "expected_best",
    "families",
    "forgetting_table",
    "headline",
    "holm",
    "indistinct_groups",
    "load",
    "load_curves",
    "load_for_rule",
    "load_forgetting",
    "load_published",
    "load_results",
    "matrix_to_latex",
    "matrix_to_markdown",
    "matrix_to_terminal",
    "mcnemar",
    "mean_relative_drop",
    "minimum_detectable_effect",
    "own_frame",
    "predictions",
    "read_manifest",
    "rule_agreement",
    "sample_agreement",
    "scatter",
    "search_points",
    "seed_variance",
    "select",
    "size_matrix",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_terminal",
    "variance_components",
    "welch",
    "write_report",
]
