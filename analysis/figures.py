"""One figure: in-domain against out-of-domain accuracy, a point for each report trial."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from analysis.selection import select

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette (2008), which colour-blind readers can tell apart; its yellow is left out, too faint on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK = "#010203"  # stands for the colour of the text around the figure, so that it reads in the light and in the dark
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "llmft", "font.size": 10.0, "text.color": _INK, "axes.labelcolor": _INK}
_STYLE |= {"axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "text.parse_math": False, "text.usetex": False}
_PANEL, _COLUMNS, _TITLE = 4.2, 3, 44  # inches, panels in a row, characters


def scatter(frame: pd.DataFrame, rule: str = "best_dev") -> str:
    """In-domain (x) against out-of-domain (y) accuracy in %, one point for each report trial, one panel for each model and task.

    Colour tells the method, the marker the number of shots; dashed lines are the majority class, the thin diagonal is where both
    accuracies are the same. The same frame gives the same bytes.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.RULES`).

    Returns:
        An SVG element that takes its text colour from its surroundings. With no trial to show it says so.

    Raises:
        UserError: there is no such rule.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = select(frame, rule).dropna(subset=["in_domain_score", "out_of_domain_score"])
    if points.empty:
        return _notice("No trial has both an in-domain and an out-of-domain accuracy.")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sorted(points["method"].unique()))}
    markers = {n: MARKERS[i % len(MARKERS)] for i, n in enumerate(sorted(points["n_shots"].unique()))}
    panels = list(points.groupby(["model", "task"]))
    n_columns = min(_COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_PANEL * n_columns + 1.9, _PANEL * n_rows), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, ((model, task), trials) in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, trials, colours, markers)
            title = f"{model} on {task}"
            axes.set_title(title if len(title) <= _TITLE else f"…{title[1 - _TITLE :]}", fontsize=10.5)
        blank = {"linestyle": "", "markersize": 7}
        handles = [Line2D([], [], color=colour, marker="o", label=name, **blank) for name, colour in colours.items()]
        handles += [
            Line2D([], [], color=_INK, marker=marker, fillstyle="none", label=f"{n} shots", **blank)
            for n, marker in markers.items()
        ]
        handles.append(Line2D([], [], color=_INK, linestyle="--", linewidth=1, alpha=0.6, label="majority class"))
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9.5)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _embeddable(file.getvalue())


def _draw_panel(axes: Axes, trials: pd.DataFrame, colours: dict[str, str], markers: dict[int, str]) -> None:
    values = 100 * trials[["in_domain_score", "out_of_domain_score", "in_domain_majority", "out_of_domain_majority"]]
    low, high = max(0.0, values.min().min() - 4), min(100.0, values.max().max() + 4)
    axes.plot([low, high], [low, high], color=_INK, alpha=0.25, linewidth=0.8, zorder=0)
    axes.axvline(values["in_domain_majority"].mean(), color=_INK, alpha=0.45, linewidth=1, linestyle="--", zorder=0)
    axes.axhline(values["out_of_domain_majority"].mean(), color=_INK, alpha=0.45, linewidth=1, linestyle="--", zorder=0)
    for (method, n_shots), of_cell in trials.groupby(["method", "n_shots"]):
        x, y = 100 * of_cell["in_domain_score"], 100 * of_cell["out_of_domain_score"]
        axes.scatter(x, y, s=42, color=colours[method], marker=markers[n_shots], alpha=0.75, linewidths=0, clip_on=False)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", facecolor="none")
    names = [next(iter(trials[f"{prefix}_set"].dropna()), "") for prefix in ("in_domain", "out_of_domain")]
    axes.set_xlabel(f"in domain: {names[0]}, accuracy in %")
    axes.set_ylabel(f"out of domain: {names[1]}, accuracy in %")
    axes.spines[["top", "right"]].set_visible(False)


def _embeddable(svg: str) -> str:
    """The element alone (no XML header), with the surroundings' text colour and font, and a name for screen readers."""
    element = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    label = "In-domain against out-of-domain accuracy, one point for each trial"
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _notice(text: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{text}" viewBox="0 0 520 48" width="520" height="48">'
        f'<text x="0" y="28" fill="currentColor" font-family="system-ui, sans-serif" font-size="14">{text}</text></svg>\n'
    )
