"""Attribute the spread over seeds to the drawn examples, their order and the new weights, where a plan varies them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames import CELL, group_by, select
from analysis.stats.significance import variance_components
from llmft.seeds import SEED_FIELDS

if TYPE_CHECKING:
    import pandas as pd


def seed_variance(frame: pd.DataFrame, rule: str = "best_dev", score: str = "out_of_domain_score") -> pd.DataFrame:
    """Attribute the variance of each cell's scores to the kinds of seeds (`analysis.stats.significance.variance_components`).

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`).
        score: the column.

    Returns:
        One row for each cell and component: the cell, `n` trials, `component` ('data', 'order', 'init', 'dropout', several joined
        by '+' where they always vary together, 'residual'), `variance`, `share` of the sum in [0, 1] (NaN where nothing varies).
        Where a plan does not say otherwise (`report: vary`) all four seeds are one number, so there is one component.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    done = chosen[(chosen["status"] == "finished") & chosen[score].notna() & chosen["data_seed"].notna()]
    rows = []
    for cell, trials in group_by(done, CELL):
        if len(trials) < 2:
            continue
        factors = {name.removesuffix("_seed"): trials[name].fillna(-1).to_numpy() for name in SEED_FIELDS}
        components = variance_components(trials[score].to_numpy(), factors)
        total = sum(components.values())
        for name, variance in components.items():
            rows.append((*cell, len(trials), name, variance, variance / total if total > 0 else float("nan")))
    return pd.DataFrame(rows, columns=[*CELL, "n", "component", "variance", "share"]).assign(rule=rule)
