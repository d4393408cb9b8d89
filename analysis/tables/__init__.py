"""Comparisons as data frames and as Markdown, LaTeX, CSV and terminal tables."""

from analysis.tables.comparison import compare, compare_groups
from analysis.tables.details import command_table, example_table, forgetting_text_table, group_tables, trial_finding_table, variance_table
from analysis.tables.forgetting import load_forgetting
from analysis.tables.formatting import TITLES, axis_name, build_blocks, metric_name, p_text, percent, span, tallies, unit
from analysis.tables.protocol import cost_table, facts, failure_table, provenance, search_table
from analysis.tables.ranking import Ranking, build_ranking, difference_table
from analysis.tables.render import to_csv, to_latex, to_markdown, to_terminal
from analysis.tables.side_by_side import compare_runs, comparison_notes, comparison_table, comparison_title, short_name
from analysis.tables.size_matrix import MARKS, matrix_cells
from analysis.tables.text_table import table_to_terminal

__all__ = [
    "MARKS", "Ranking", "TITLES", "axis_name", "build_blocks", "build_ranking", "command_table", "compare", "compare_groups",
    "compare_runs", "comparison_notes", "comparison_table", "comparison_title", "cost_table", "difference_table", "example_table",
    "facts", "failure_table", "forgetting_text_table", "group_tables", "load_forgetting", "matrix_cells", "metric_name", "p_text",
    "percent", "provenance", "search_table", "short_name", "span", "table_to_terminal", "tallies", "to_csv", "to_latex", "to_markdown",
    "to_terminal", "trial_finding_table", "unit", "variance_table",
]  # fmt: skip
