"""Select which trials and checkpoints count: one rule for the whole table; cells, and the conditions they should share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, get_args

from llmft.config import Selection, TrainSpec
from llmft.errors import unknown_name

if TYPE_CHECKING:
    import pandas as pd


CELL = ["model", "task", "method", "n_shots", "pattern"]
"""The columns that tell one row of the comparison from another."""

CONDITIONS = ("shots_unit", "verbalizer", "precision", "learning_rate", "epochs", "batch_size", "settings", "n_dev")
"""The columns that, with the rest of `train`, should be the same in all that one row averages, and in rows that are compared."""

RULES: tuple[str, ...] = tuple(rule for rule in get_args(Selection) if rule != "none")


def differing_conditions(differs: Callable[[Callable[[pd.DataFrame], pd.Series]], bool]) -> list[str]:
    """Name the conditions that differ: by their columns or, for the rest of the training, by its fields.

    Args:
        differs: tells whether a condition differs, given the function that takes its values from a frame.
    """

    def of_training(field: str) -> Callable[[pd.DataFrame], pd.Series]:
        return lambda frame: frame["train"].map(lambda text: json.dumps(json.loads(text).get(field)), na_action="ignore")

    names = [column for column in CONDITIONS if differs(itemgetter(column))]
    if differs(itemgetter("train")):
        names += [field for field in TrainSpec.model_fields if field not in CONDITIONS and differs(of_training(field))]
    return names


def group_by(rows: pd.DataFrame, columns: Sequence[str], sort: bool = True) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Group `rows` by several columns: (values of the columns, rows), in the order of the values, or of the rows if not `sort`."""
    yield from rows.groupby(list(columns), sort=sort)


def select(frame: pd.DataFrame, rule: str = "best_dev") -> pd.DataFrame:
    """Select the report trials, one row each: under `rule` where a checkpoint was selected, as they are where there was none.

    So rows of untrained methods, of failed trials and of unreadable records (`selection` 'none') stay under every rule. A trial
    that finished without a checkpoint under this rule has no row; `analysis.compare` counts those.

    Args:
        frame: from `analysis.load`.
        rule: one of `RULES`, or another that the frame holds (`analysis.frames.few_labels` adds one); the oracles look at the
            reported sets, and their rows keep `is_oracle`.

    Returns:
        The rows, with the column `rule` added.

    Raises:
        UserError: there is no such rule.
    """
    own = set(frame["selection"].dropna()) - {"none"}
    if rule not in {*RULES, *own}:
        raise unknown_name("selection rule", rule, {*RULES, *own})
    chosen = frame[(frame["stage"] == "report") & frame["selection"].isin([rule, "none"])]
    if rule not in RULES:  # an added rule may have its own row of an untrained method
        chosen = chosen[(chosen["selection"] == rule) | ~chosen["digest"].isin(chosen.loc[chosen["selection"] == rule, "digest"])]
    return chosen.assign(rule=rule)


def choose(frame: pd.DataFrame) -> pd.DataFrame:
    """Choose the hyper-parameters of each cell with the best mean dev score over the search seeds.

    Returns:
        One row for each cell that was searched: the cell, `learning_rate`, `epochs`, `batch_size`, `settings`, `train` (all of
        them, JSON), `dev_score`, `n_seeds` of the winner, and `n_points`, the number of settings that were tried. Points that
        failed under some seed are no candidates, for their mean would be that of the seeds that went well.
    """
    import pandas as pd

    searched = frame[(frame["stage"] == "search") & (frame["status"] != "unreadable")]
    rows = []
    for cell, trials in group_by(searched, CELL):
        points = trials.groupby(["train", "settings"], sort=False)
        complete = points["status"].agg(lambda states: bool((states == "finished").all()))
        means = points["dev_score"].mean()[complete]
        if means.empty:
            continue
        best = points.get_group(means.idxmax())
        values = {name: best[name].iloc[0] for name in ("learning_rate", "epochs", "batch_size", "settings", "train")}
        counts = {"dev_score": means.max(), "n_seeds": best["data_seed"].nunique(), "n_points": len(complete)}
        rows.append(dict(zip(CELL, cell, strict=True)) | values | counts)
    names = [*CELL, "learning_rate", "epochs", "batch_size", "settings", "train", "dev_score", "n_seeds", "n_points"]
    return pd.DataFrame(rows, columns=names)


def common_shots(rows: pd.DataFrame) -> int:
    """Return the number of shots with the most methods; the largest of equals, 0 where nothing has shots."""
    tried = rows[rows["n_shots"] > 0] if "n" not in rows else rows[(rows["n_shots"] > 0) & (rows["n"].fillna(0) > 0)]
    counts = [(cells["method"].nunique(), int(n_shots)) for (n_shots,), cells in group_by(tried, ["n_shots"])]
    return max(counts, default=(0, 0))[1]
