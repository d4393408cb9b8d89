"""Measure how alike two selection rules rank the methods, and how well a few examples stand for a test set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.frames import CELL, example_scores, select, shared_examples
from llmft.records import StoragePath
from llmft.seeds import stream

if TYPE_CHECKING:
    import pandas as pd


def rule_agreement(frame: pd.DataFrame, rule: str, other: str, score: str = "out_of_domain_score") -> dict[str, float]:
    """Correlate the cells' mean scores under two selection rules: Pearson's r and Spearman's rho.

    Returns:
        `n_cells`, `pearson`, `spearman` (NaN for fewer than three cells, or where all means are equal), and `difference`, the mean
        score under `rule` minus that under `other`.

    Raises:
        UserError: there is no such rule.
    """
    means = [_means(select(frame, name), score) for name in (rule, other)]
    shared = means[0].index.intersection(means[1].index)
    a, b = (scores.loc[shared].to_numpy() for scores in means)
    return {"n_cells": len(shared), **correlations(a, b), "difference": float((a - b).mean()) if len(shared) else math.nan}


def _means(trials: pd.DataFrame, score: str) -> pd.Series:
    trained = trials[(trials["selection"] != "none") & trials[score].notna()]  # the others are the same under every rule
    return trained.groupby(CELL)[score].mean()


def correlations(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compute Pearson's r and Spearman's rho; NaN for fewer than three values, or where one side has no spread."""
    from scipy.stats import pearsonr, spearmanr

    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    return {"pearson": float(pearsonr(a, b).statistic), "spearman": float(spearmanr(a, b).statistic)}


def sample_agreement(
    root: str | StoragePath, frame: pd.DataFrame, set_name: str, n: int = 50, n_draws: int = 100, seed: int = 0
) -> dict[str, float]:
    """Correlate the score on `n` examples of a set with that on the rest, over all checkpoints of all report trials.

    Mosbach et al. 2023 find r = .99 for 50 out-of-domain examples. The n examples are drawn `n_draws` times and compared with the
    other examples of the set.

    Returns:
        `n_checkpoints`, and the means over the draws of `pearson` and `spearman`.
    """
    trials = frame[(frame["stage"] == "report") & (frame["status"] == "finished")]
    tables = [example_scores(root, of_rule, set_name)[0] for _, of_rule in trials.groupby("selection")]
    ids = shared_examples(tables)
    rows = [table[ids].to_numpy() for table in tables if len(table)]
    scores = np.concatenate(rows) if rows else np.empty((0, 0))  # [checkpoints, examples]
    if len(scores) < 3 or scores.shape[1] <= n:
        return {"n_checkpoints": len(scores), "pearson": math.nan, "spearman": math.nan}
    generator, totals, draws = stream(seed, f"agreement/{set_name}"), scores.sum(1), []
    for _ in range(n_draws):
        picked = scores[:, generator.choice(scores.shape[1], n, replace=False)].sum(1)
        draws.append(correlations(picked / n, (totals - picked) / (scores.shape[1] - n)))
    means = {name: float(np.mean([draw[name] for draw in draws])) for name in ("pearson", "spearman")}
    return {"n_checkpoints": len(scores), **means}
