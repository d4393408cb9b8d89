"""Draw the training and the search: dev scores only, never the reported sets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import Look, draw, draw_line, log_axis, notice
from analysis.frames import CELL, group_by
from analysis.stats import budget_curves, by_model, search_points, shown_half_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def learning_curves(frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Draw the mean dev score after each epoch over the report trials of a cell, with the 95 % interval, a panel for each number of shots.

    A training that ended early, out of patience, counts to its last planned epoch with its last score.

    Args:
        curves: from `analysis.frames.load_curves`.
    """
    report = frame[frame["stage"] == "report"].drop_duplicates("digest")
    points = curves.dropna(subset=["dev_score"]).merge(report[["digest", "status", "epochs", *CELL]], on="digest")
    if points.empty:
        return notice("No trial was scored on dev during training.")
    look = Look(frame)
    points = look.name(points)

    def paint(axes: Axes, cells: pd.DataFrame) -> None:
        for (name,), of_name in group_by(cells, ["name"]):
            by_epoch = _carried_on(of_name).groupby("epoch")["dev_score"]
            half = [shown_half_width(scores.to_numpy()) for _, scores in by_epoch]
            draw_line(axes, look, name, by_epoch.mean().index.to_numpy(float), by_epoch.mean(), half, band=True)
        axes.set(xlabel="epoch", ylabel="dev score × 100")

    panels = [(f"{m} on {t}, {n} shots", cells) for (m, t, n), cells in by_model(points, "task", "n_shots")]
    return draw(panels, paint, lambda: look.handles(points), "Dev score during training")


def _carried_on(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points of one cell, and the last of each finished trial once more at every later epoch at which others have one."""
    import pandas as pd

    last = points.loc[points.groupby("digest")["epoch"].idxmax()].query("status == 'finished'")
    later = last.drop(columns="epoch").merge(points["epoch"].drop_duplicates(), how="cross")
    later = later[(later["epoch"] <= later["epochs"]) & (later["epoch"] > later["digest"].map(last.set_index("digest")["epoch"]))]
    return pd.concat([points, later])


def rates_figure(frame: pd.DataFrame) -> str:
    """Draw the dev score (mean over the search seeds) of every setting that the search tried, against its learning rate."""
    points = search_points(frame)
    points = points[points["learning_rate"].notna() & (points["n_failed"] == 0)]
    if points.groupby(CELL)["learning_rate"].nunique().max() in (0, 1) or points.empty:
        return notice("No search tried several learning rates.")
    look = Look(frame)
    points = look.name(points)

    def paint(axes: Axes, cells: pd.DataFrame) -> None:
        for (name,), of_name in group_by(cells, ["name"]):
            line = of_name.sort_values("learning_rate")
            nothing = np.full(len(line), math.nan)
            draw_line(axes, look, name, line["learning_rate"], line["dev_score"], nothing)
        log_axis(axes)
        axes.set(xlabel="learning rate", ylabel="dev score × 100")

    panels = [(f"{m} on {t}, {n} shots", cells) for (m, t, n), cells in by_model(points, "task", "n_shots")]
    return draw(panels, paint, lambda: look.handles(points), "Dev score against the learning rate")


def budget_figure(frame: pd.DataFrame) -> str:
    """Draw the expected best dev score against the number of settings tried (Dodge et al. 2019)."""
    curves = budget_curves(frame)
    if curves.empty or curves["n_trials"].max() < 2:
        return notice("No search tried several settings.")
    look = Look(frame)
    curves = look.name(curves)

    def paint(axes: Axes, cells: pd.DataFrame) -> None:
        for (name,), line in group_by(cells, ["name"]):
            draw_line(axes, look, name, line["n_trials"].astype(float), line["expected"], np.full(len(line), math.nan))
        axes.locator_params("x", integer=True)
        axes.set(xlabel="settings tried", ylabel="expected best dev score × 100")

    panels = [(f"{m} on {t}, {n} shots", cells) for (m, t, n), cells in by_model(curves, "task", "n_shots")]
    return draw(panels, paint, lambda: look.handles(curves), "Expected best dev score against the search budget")
