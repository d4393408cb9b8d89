"""Tests, intervals and contrasts."""

from analysis.stats.budget import COSTS, budget_curves, costs, search_points
from analysis.stats.comparisons import MAJORITY, Contrast, Family, Sample, build_families, contrast_table
from analysis.stats.decision import Decision, decide, main_family
from analysis.stats.examples import example_contrasts
from analysis.stats.matrix import size_matrix
from analysis.stats.model_sizes import by_model, model_size, size_name
from analysis.stats.significance import FEWEST, Difference, holm, one_sample, shown_half_width, welch
from analysis.stats.variance import seed_variance

__all__ = [
    "COSTS", "Contrast", "Decision", "Difference", "FEWEST", "Family", "MAJORITY", "Sample", "budget_curves", "build_families",
    "by_model", "contrast_table", "costs", "decide", "example_contrasts", "holm", "main_family", "model_size", "one_sample",
    "search_points", "seed_variance", "shown_half_width", "size_matrix", "size_name", "welch",
]  # fmt: skip
