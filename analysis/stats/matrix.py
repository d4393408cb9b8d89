"""Compare one way of adapting with another over all sizes of a family of models: the matrices of Mosbach et al. 2023.

size_matrix(load_published(), row={"method": "in_context", "pattern": "gpt-3"}, column={"method": "pattern"},
            rule="best_in_domain", model="facebook/opt-*", task="rte", n_shots=16)             # the paper's Table 1 (a)
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames import select
from analysis.stats.model_sizes import model_order, model_size
from analysis.stats.significance import ALPHA, holm, welch
from llmft.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pandas as pd


SCORES = ("out_of_domain_score", "in_domain_score", "gap")
_CONDITIONS = ("task", "n_shots", "method", "pattern", "verbalizer")  # what must be one thing along each side


def size_matrix(
    frame: pd.DataFrame,
    row: Mapping[str, Any],
    column: Mapping[str, Any],
    rule: str = "best_dev",
    score: str = "out_of_domain_score",
    correction: str | None = None,
    **where: Any,
) -> pd.DataFrame:
    """Compare every model adapted one way (`column`) with every model adapted another way (`row`).

    Each difference is tested by Welch's t-test, one-sided in each direction: the models differ, so runs are not paired. The paper
    does not correct for the number of cells; `correction` 'holm' does, over both directions of the whole matrix.

    Args:
        frame: from `analysis.load` or `analysis.load_published`.
        row, column: what the two sides are, column of the frame -> value; texts may have wildcards ('facebook/opt-*').
        rule: which checkpoint counts, where one was selected.
        score: one of `SCORES`.
        correction: None or 'holm'.
        where: conditions on both sides.

    Returns:
        One row for each pair, sizes ascending: `row_model`, `column_model`, `row_size`, `column_size` (parameters, from the names),
        `n_row`, `n_column`, `row_mean`, `column_mean`, `difference` (column minus row), `p_column` that column is better, `p_row`
        that row is, `better`: 'column', 'row' or ''; `rule`, `score`.

    Raises:
        UserError: a name is not known; a side has no trial, or mixes conditions.
    """
    import pandas as pd

    if score not in SCORES:
        raise unknown_name("score", score, SCORES)
    if correction not in (None, "holm"):
        raise unknown_name("correction", str(correction), ["holm"])
    trials = select(frame, rule)
    trials = trials[trials[score].notna()]
    sides = []
    for name, conditions in (("row", {**where, **row}), ("column", {**where, **column})):
        side = _matching(trials, conditions, name)
        sides.append([(str(model), scores.to_numpy()) for model, scores in side.groupby("model")[score]])
        sides[-1].sort(key=lambda pair: model_order(pair[0]))
    rows = []
    for row_model, a in sides[0]:
        for column_model, b in sides[1]:
            rows.append(
                {
                    "row_model": row_model, "column_model": column_model,
                    "row_size": model_size(row_model), "column_size": model_size(column_model),
                    "n_row": len(a), "n_column": len(b), "row_mean": a.mean(), "column_mean": b.mean(),
                    "difference": b.mean() - a.mean(), "p_column": welch(b, a, "greater").p, "p_row": welch(b, a, "less").p,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    if correction:
        adjusted = holm([*table["p_column"], *table["p_row"]])
        table["p_column"], table["p_row"] = adjusted[: len(table)], adjusted[len(table) :]
    table["better"] = ""
    table.loc[table["p_column"] < ALPHA, "better"] = "column"
    table.loc[table["p_row"] < ALPHA, "better"] = "row"
    return table.assign(rule=rule, score=score)


def _matching(trials: pd.DataFrame, conditions: Mapping[str, Any], side: str) -> pd.DataFrame:
    for column, wanted in conditions.items():
        if column not in trials:
            raise unknown_name("column", column, trials.columns, f"size_matrix, {side}")
        if isinstance(wanted, str):
            trials = trials[np.array([isinstance(value, str) and fnmatchcase(value, wanted) for value in trials[column]], bool)]
        else:
            trials = trials[(trials[column] == wanted).fillna(False).astype(bool)]
    if trials.empty:
        raise UserError(f"size_matrix: no trial has {side} {_words(conditions)}. Look at the frame's columns, or the rule.")
    for column in _CONDITIONS:
        if (values := trials[column].dropna().unique()).size > 1:
            raise UserError(f"size_matrix: {side} mixes {column} {', '.join(map(str, values))}; say which, as {column}=....")
    return trials


def _words(conditions: Mapping[str, Any]) -> str:
    return ", ".join(f"{column} {wanted!r}" for column, wanted in conditions.items())
