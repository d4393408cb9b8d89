"""Do two ways of choosing checkpoints rank the methods alike?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.selection import CELL, select

if TYPE_CHECKING:
    import pandas as pd


def rule_agreement(frame: pd.DataFrame, rule: str, other: str, score: str = "out_of_domain_score") -> dict[str, float]:
    """How alike two selection rules rank the cells: Pearson's r and Spearman's rho of the cells' mean scores.

    Returns:
        `n_cells`, `pearson`, `spearman` (NaN for fewer than three cells, or where all means are equal), and `difference`, the mean
        score under `rule` minus that under `other`.

    Raises:
        UserError: there is no such rule.
    """
    means = [_means(select(frame, name), score) for name in (rule, other)]
    shared = means[0].index.intersection(means[1].index)
    a, b = (each.loc[shared].to_numpy() for each in means)
    return {"n_cells": len(shared), **correlations(a, b), "difference": float((a - b).mean()) if len(shared) else math.nan}


def _means(trials: pd.DataFrame, score: str) -> pd.Series:
    trained = trials[(trials["selection"] != "none") & trials[score].notna()]  # the others are the same under every rule
    return trained.groupby(CELL)[score].mean()


def correlations(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Pearson's r and Spearman's rho; NaN for fewer than three values, or where one side has no spread."""
    from scipy.stats import pearsonr, spearmanr

    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    return {"pearson": float(pearsonr(a, b).statistic), "spearman": float(spearmanr(a, b).statistic)}
