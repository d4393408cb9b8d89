"""Lay out the dot plots beside the rows of the report's table: each mean a dot, its interval a line."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.frames import group_by
from analysis.stats import MAJORITY

if TYPE_CHECKING:
    import pandas as pd


WIDTH, _MARGIN = 140, 6  # pixels
_HEIGHTS = {"in_domain": 8, "out_of_domain": 18}  # where each domain's line lies, pixels from the top
_STEP = 0.05  # the scale begins and ends at a multiple of this


@dataclass(frozen=True)
class Mark:
    """One mean: a dot at `x`, a line from `x0` to `x1`, all at height `y`, in pixels. `prefix` is the domain's."""

    prefix: str
    x: float
    x0: float
    x1: float
    y: int


@dataclass(frozen=True)
class DotPlots:
    """The drawings of one block: the marks of each row, those of the majority class, and what the scale spans, in words."""

    scale: str = ""
    majority: list[Mark] = field(default_factory=list)
    rows: list[list[Mark]] = field(default_factory=list)


def draw_dot_plots(comparison: pd.DataFrame) -> list[DotPlots]:
    """Lay out the dot plots of each block, in the order of `analysis.tables.build_blocks`; all rows of a block share a scale."""
    plots = []
    for _, of_block in group_by(comparison, ["model", "task"], sort=False):
        rows = of_block.to_dict("records")
        ends = [end for row in rows for prefix in _HEIGHTS for end in _interval(row, prefix)[1:] if not math.isnan(end)]
        if not ends:  # nothing finished
            plots.append(DotPlots(rows=[[] for _ in rows]))
            continue
        low = max(0.0, math.floor(min(ends) / _STEP) * _STEP)
        high = min(1.0, math.ceil(max(ends) / _STEP) * _STEP)
        drawn = [_marks(row, low, max(high, low + _STEP)) for row in rows]
        majority = next((marks for row, marks in zip(rows, drawn, strict=True) if row["method"] == MAJORITY), [])
        plots.append(DotPlots(f"{100 * low:.0f} to {100 * high:.0f} %", majority, drawn))
    return plots


def _interval(row: Mapping[Hashable, Any], prefix: str) -> tuple[float, float, float]:
    mean, half_width = row[f"{prefix}_mean"], row[f"{prefix}_half_width"]
    half_width = 0.0 if math.isnan(half_width) else half_width
    return mean, mean - half_width, mean + half_width


def _marks(row: Mapping[Hashable, Any], low: float, high: float) -> list[Mark]:
    def x(share: float) -> float:
        return round(_MARGIN + (min(max(share, low), high) - low) / (high - low) * (WIDTH - 2 * _MARGIN), 1)

    intervals = {prefix: _interval(row, prefix) for prefix in _HEIGHTS}
    return [
        Mark(prefix, x(mean), x(start), x(end), _HEIGHTS[prefix])
        for prefix, (mean, start, end) in intervals.items()
        if not math.isnan(mean)
    ]
