"""Records become declared data frames; which rows count."""

from analysis.frames.columns import DOMAINS, typed_frame
from analysis.frames.few_labels import load_for_rule
from analysis.frames.loading import assign_stages, load_curves, record_paths
from analysis.frames.predictions import example_scores, shared_examples
from analysis.frames.published import SOURCES, load_published, load_results, published_settings
from analysis.frames.rows import LABEL
from analysis.frames.selection import CELL, common_shots, differing_conditions, group_by, select

__all__ = [
    "CELL", "DOMAINS", "LABEL", "SOURCES", "assign_stages", "common_shots", "differing_conditions", "example_scores", "group_by",
    "load_curves", "load_for_rule", "load_published", "load_results", "published_settings", "record_paths", "select", "shared_examples",
    "typed_frame",
]  # fmt: skip
