"""Measure what a model forgot: the numbers of other benchmarks before and after adapting, as a frame and as a table.

    frame = analysis.load_forgetting("results")         # one row for each trial and number
    analysis.forgetting_table(frame)                    # one row for each cell and number: mean drop with its interval

A drop is positive where the model got worse, whichever way its metric points: R_0 - R_t for an accuracy, R_t - R_0 for a
perplexity. The relative drop divides by R_0; its mean over tasks, in percent, is the FG of Luo et al. 2023.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.frames import CELL, assign_stages, record_paths, typed_frame
from llmft.errors import UserError
from llmft.records import Change, RecordError, StoragePath, TrialRecord, read_evaluation, read_many, read_record

if TYPE_CHECKING:
    import pandas as pd


NUMBER = ["source", "name", "metric"]
"""What tells one number of a trial from another: 'llmft', 'harness' or 'text', the task or file, the metric."""

_STRINGS = ("digest", "stage", "measured", "model", "task", "method", "base_method", "pattern", *NUMBER)
_NUMBERS = ("before", "after", "before_stderr", "after_stderr", "drop", "relative_drop", "weight_distance")
_DTYPES = {
    **dict.fromkeys(_STRINGS, "str"),
    **dict.fromkeys(("n_shots", "data_seed", "n"), "Int64"),
    "larger_is_better": "bool",
    **dict.fromkeys(_NUMBERS, "float64"),
}


def load_forgetting(root: str | StoragePath) -> pd.DataFrame:
    """Load every number that the trials below `root` measured beside their tasks.

    Args:
        root: as for `analysis.load`.

    Returns:
        One row for each number. `measured` is 'trial' (in the sweep) or 'later' (`llmft evaluate`); `drop` and `relative_drop` are
        NaN where the base model was not measured. `weight_distance` is that of the weights that were measured: the best on dev
        where these are selected, else the last. Empty, with these columns, where nothing was measured.

    Raises:
        UserError: the folder is not there or holds no record, or an evaluation is damaged.
    """
    rows = [row for of_trial in read_many(_read_rows, [path.parent for path in record_paths(root)]) for row in of_trial]
    assign_stages(rows, root)
    return typed_frame(rows, _DTYPES)


def _read_rows(folder: StoragePath) -> list[dict[str, Any]]:
    try:
        record = read_record(folder)
    except RecordError:
        return []  # `analysis.load` has a row for it
    try:
        evaluation = read_evaluation(folder)
    except RecordError as error:
        raise UserError(str(error)) from None
    rows = [_row(record, change, "trial") for change in record.forgetting]
    return rows + [_row(record, change, "later") for change in (evaluation.changes if evaluation else ())]


def _row(record: TrialRecord, change: Change, measured: str) -> dict[str, Any]:
    spec, after, moved = record.spec, change.after, record.weight_distance
    before = change.before.value if change.before else math.nan
    drop = before - after.value if after.larger_is_better else after.value - before
    return {
        "digest": record.digest,
        "measured": measured,
        "model": spec.model.name,
        "task": spec.task,
        "base_method": spec.method,
        "n_shots": spec.n_shots,
        "pattern": spec.pattern,
        "data_seed": spec.data_seed,
        "source": after.source,
        "name": after.name,
        "metric": after.metric,
        "n": after.n,
        "larger_is_better": after.larger_is_better,
        "before": before,
        "after": after.value,
        "before_stderr": change.before.stderr if change.before else None,
        "after_stderr": after.stderr,
        "drop": drop,
        "relative_drop": drop / before if before else math.nan,
        "weight_distance": next((moved[name] for name in ("best_dev", "last", "none") if name in moved), math.nan),
    }


def forgetting_table(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Average the drop of each number over the seeds of each cell.

    Args:
        frame: from `load_forgetting`; rows of the search, and those without a number before, are left out, and of a number that a
            trial has from the sweep and from later, the later one.
        confidence: of the interval (Student's t over the seeds; NaN for a single one). It says nothing about the noise of the
            task's own examples, which `before_stderr` and `after_stderr` do.

    Returns:
        Index model, task, method, n_shots, pattern, source, name, metric; columns n_trials, before, after, drop, drop_sd, drop_low,
        drop_high, relative_drop, weight_distance (means over the trials, but for n_trials, drop_sd and the interval's ends).
    """
    from scipy.special import stdtrit

    grouped = _counted(frame).groupby([*CELL, *NUMBER], sort=False)
    table = grouped[["before", "after", "drop", "relative_drop", "weight_distance"]].mean()
    n, sd = grouped.size(), grouped["drop"].std()
    half = stdtrit((n - 1).where(n > 1), (1 + confidence) / 2) * sd / n**0.5
    table.insert(0, "n_trials", n)
    table.insert(4, "drop_sd", sd)
    table.insert(5, "drop_low", table["drop"] - half)
    table.insert(6, "drop_high", table["drop"] + half)
    return table


def _counted(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with a drop of the reported trials, each number once."""
    rows = frame[(frame["stage"] != "search") & frame["drop"].notna()]
    return rows.sort_values("measured", ascending=False, kind="stable").drop_duplicates(["digest", *NUMBER])  # 'trial' first


def mean_relative_drop(frame: pd.DataFrame) -> pd.Series:
    """Compute FG of Luo et al. 2023 (in [0, 1], not percent) for each cell: the mean relative drop over tasks, then over trials.

    Perplexities are no tasks and are left out, and so is every metric of a task but its first. A group of the harness counts as a
    task beside its own: select rows of the frame where that is not meant.
    """
    rows = _counted(frame)
    first = rows[rows["source"] != "text"].drop_duplicates(["digest", "source", "name"])
    by_trial = first.groupby([*CELL, "digest"], sort=False)["relative_drop"].mean()
    return by_trial.groupby(level=CELL, sort=False).mean()
