"""Relate scores to their costs: search trials, seconds, parameters and tokens of each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.frames import CELL, group_by, select
from analysis.stats.significance import expected_best

if TYPE_CHECKING:
    import pandas as pd


COSTS = {
    "device_hours": "device-hours of a trial",
    "tokens_trained": "tokens seen in training",
    "n_trainable_parameters": "trained parameters",
    "tokens_per_query": "tokens per query",
}
"""What a score is set against; less is better."""


def search_points(frame: pd.DataFrame) -> pd.DataFrame:
    """List every setting that the search tried: the cell, `learning_rate`, `train`, `settings`, and the mean `dev_score` over seeds.

    The `dev_score` of a setting with failed trials is 0; `n_failed` counts them.
    """
    import pandas as pd

    searched = frame[(frame["stage"] == "search") & frame["status"].isin(["finished", "failed"])]
    rows = []
    for key, trials in searched.groupby([*CELL, "train", "settings"], sort=True):
        n_failed = int((trials["status"] == "failed").sum())
        score = 0.0 if n_failed else trials["dev_score"].mean()
        rows.append((*key, trials["learning_rate"].iloc[0], score, len(trials), n_failed, trials["wall_s"].sum()))
    return pd.DataFrame(rows, columns=[*CELL, "train", "settings", "learning_rate", "dev_score", "n_seeds", "n_failed", "wall_s"])


def budget_curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute the expected best dev score against the number of settings tried, for each cell (Dodge et al. 2019).

    The formula assumes settings drawn at random; a sampler that learns from earlier ones does better.

    Returns:
        The cell, `n_trials` from 1 to the number tried, `expected`.
    """
    import pandas as pd

    rows = [
        (*cell, n, value)
        for cell, points in group_by(search_points(frame), CELL)
        for n, value in enumerate(expected_best(points["dev_score"].to_numpy()), start=1)
    ]
    return pd.DataFrame(rows, columns=[*CELL, "n_trials", "expected"])


def costs(frame: pd.DataFrame, rule: str = "best_dev", score: str = "out_of_domain_score") -> pd.DataFrame:
    """Put each cell's mean score beside its costs (`COSTS`, means over the finished report trials), and mark the Pareto front.

    Returns:
        The cell, `score`, the costs, `search_hours` (device-hours of the cell's whole search; 0 where there was none), and for each
        cost `front_<cost>`: no other cell of the model and task has a better score for as little (NaN costs are never on it).

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    done = chosen[(chosen["status"] == "finished") & chosen[score].notna()].assign(device_hours=_device_hours)
    searched = frame[frame["stage"] == "search"].drop_duplicates("digest").assign(device_hours=_device_hours)
    search_hours = searched.groupby(CELL)["device_hours"].sum()
    rows = []
    for cell, trials in group_by(done, CELL):
        means = trials[list(COSTS)].astype("float64").mean().to_dict()
        numbers = {"score": trials[score].mean(), **means, "search_hours": search_hours.get(cell, 0.0)}
        rows.append(dict(zip(CELL, cell, strict=True)) | numbers)
    table = pd.DataFrame(rows, columns=[*CELL, "score", *COSTS, "search_hours"])
    for cost in COSTS:
        table[f"front_{cost}"] = False
        for _, cells in table.groupby(["model", "task"]):
            table.loc[cells.index, f"front_{cost}"] = _on_front(cells["score"].to_numpy(), cells[cost].to_numpy())
    return table.assign(rule=rule)


def _device_hours(trials: pd.DataFrame) -> pd.Series:
    return trials["wall_s"] * trials["n_workers"].fillna(1).astype("float64") / 3600


def _on_front(score: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Mark the cells that no other equals on both score and cost and beats on one  # [cells]."""
    as_good = (score[:, None] <= score) & (cost[:, None] >= cost)  # [cell, other]
    better = (score[:, None] < score) | (cost[:, None] > cost)
    return ~np.isnan(cost) & ~(as_good & better).any(1)
