"""Drawings of the results."""

from analysis.figures.dot_plots import draw_dot_plots

__all__ = ["draw_dot_plots"]
