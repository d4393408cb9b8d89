"""Set the style of all figures: panels side by side, colors for the color-blind, text in the color of the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import ArrayLike


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette (2008), which color-blind readers can tell apart; its yellow is left out, too faint on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")

INK = "#010203"  # stands for the color of the text around the figure, so that it reads in the light and in the dark
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "llmft", "font.size": 10.0, "text.color": INK, "axes.labelcolor": INK}
_STYLE |= {"axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "text.parse_math": False, "text.usetex": False}
_STYLE |= {"svg.image_inline": True, "path.simplify": True, "axes.linewidth": 0.7}
_COLUMNS, _TITLE = 3, 44  # panels in a row, characters
_LEGEND_LINE = 0.215  # inches


class Look:
    """The look of each method in every figure of a frame: colors first, then line styles and hollow markers.

    A method that was tried with several patterns is as many names: 'in_context (gpt-3)'.
    """

    def __init__(self, frame: pd.DataFrame):
        pairs = frame[["method", "pattern"]].dropna().drop_duplicates()
        several = set(pairs.loc[pairs["method"].duplicated(), "method"])
        self._names = {
            (method, pattern): f"{method} ({pattern})" if method in several else method
            for method, pattern in pairs.itertuples(index=False, name=None)
        }
        self.names = sorted(self._names.values())

    def name(self, rows: pd.DataFrame) -> pd.DataFrame:
        """`rows` with the column `name`."""
        pairs = zip(rows["method"], rows["pattern"], strict=True)
        return rows.assign(name=[self._names.get(pair, pair[0]) for pair in pairs])

    def color(self, name: str) -> str:
        return COLORS[self.names.index(name) % len(COLORS)]

    def line(self, name: str) -> str:
        return LINES[self.names.index(name) // len(COLORS) % len(LINES)]

    def marker(self, name: str) -> str:
        return MARKERS[self.names.index(name) % len(MARKERS)]

    def face(self, name: str) -> str:
        """The fill of a marker; hollow once the colors come again."""
        return "none" if self.names.index(name) // len(COLORS) % 2 else self.color(name)

    def handles(self, rows: pd.DataFrame, lines: bool = True, markers: bool = True) -> list[Line2D]:
        """For the legend: an entry for each name in `rows`."""
        return [
            handle(
                name, self.color(name), self.marker(name) if markers else "o", self.line(name) if lines else "",
                markerfacecolor=self.face(name), markersize=6,
            )
            for name in sorted(set(rows["name"]))
        ]  # fmt: skip


def handle(label: str, color: str = INK, marker: str = "", line: Any = "", **style: Any) -> Line2D:
    """Build an entry of the legend; `line` is a line style of matplotlib."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker=marker, linestyle=line, label=label, **style)


def draw(
    panels: Sequence[tuple[str, Any]],
    paint: Callable[[Axes, Any], None],
    handles: Callable[[], list[Line2D]],
    label: str,
    size: tuple[float, float] = (4.2, 3.4),
    columns: int = _COLUMNS,
) -> str:
    """Draw an SVG element with a panel for each of `panels` (title, what `paint` gets), and one legend.

    The element takes its text color from its surroundings; the same input gives the same bytes. Without panels it says so.

    Args:
        label: what screen readers say.
        size: inches of a panel.
        columns: panels in a row, at the most.
    """
    if not panels:
        return notice("No trial has a score to draw.")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    n_columns = min(columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    with matplotlib.rc_context(_STYLE):
        shown = handles()
        widest = max((len(str(line.get_label())) for line in shown), default=0)
        per_column = max(1, int((size[1] * n_rows - 0.2) / _LEGEND_LINE))
        n_lists = -(-len(shown) // per_column)
        width = size[0] * n_columns + n_lists * (0.6 + 0.085 * widest)
        figure = Figure(figsize=(width, size[1] * n_rows), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, content) in zip(grid.flat, panels, strict=False):
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
            paint(axes, content)
            axes.set_title(title if len(title) <= _TITLE else f"…{title[1 - _TITLE :]}", fontsize=10.5)
        if shown:
            figure.legend(handles=shown, loc="outside right upper", frameon=False, fontsize=9.5, ncols=n_lists)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _embeddable(file.getvalue(), label)


def draw_line(axes: Axes, look: Look, name: str, x: ArrayLike, mean: ArrayLike, half: ArrayLike, band: bool = False) -> None:
    """Draw one method's means at `x`, in percent, with their intervals (mean ± half; NaN: none) as bars, or as a band."""
    x, mean, half = (np.asarray(values, float) for values in (x, mean, half))
    style: dict[str, Any] = {"color": look.color(name), "linestyle": look.line(name), "linewidth": 1.5}
    if band:
        axes.plot(x, 100 * mean, marker=look.marker(name) if len(x) < 2 else "", **style)
        axes.fill_between(x, 100 * (mean - half), 100 * (mean + half), color=look.color(name), alpha=0.12, linewidth=0)
        return
    axes.errorbar(x, 100 * mean, yerr=100 * np.nan_to_num(half), marker=look.marker(name), markersize=5,
                  markerfacecolor=look.face(name), elinewidth=1, capsize=2, **style)  # fmt: skip


def log_axis(axes: Axes, ticks: Sequence[float] | None = None, names: Sequence[str] = (), rotation: int = 0) -> None:
    """Make the x axis logarithmic, with plain numbers, at `ticks` where they are given."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    if ticks is not None:
        axes.set_xticks(ticks, names, rotation=rotation)
        axes.minorticks_off()
        return
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > 50 else (1.0, 3.0) if high / low > 8 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axes.minorticks_off()


def notice(text: str) -> str:
    """Draw a text in the place of a figure: why there is none."""
    width = 9 * len(text)  # pixels; a letter of this size takes 7 to 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="notice" role="img" aria-label="{text}" '
        f'viewBox="0 0 {width} 48" width="{width}" height="48">'
        f'<text x="0" y="28" fill="currentColor" font-family="system-ui, sans-serif" font-size="14">{text}</text></svg>\n'
    )


def _embeddable(svg: str, label: str) -> str:
    """The element alone (no XML header), with the surroundings' text color and font, and a name for screen readers."""
    element = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
