"""Summarize trials: one row of numbers for each cell (model, task, method, shots, pattern). `analysis.tables.render` shows them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames import CELL, DOMAINS, group_by, select
from analysis.stats import MAJORITY, Family, build_families, model_size, shown_half_width
from llmft.config import ORACLES

if TYPE_CHECKING:
    import pandas as pd


_ORDER = ["model", "task", "n_shots", "method", "pattern"]
_STATISTICS = ("mean", "sd", "max", "half_width")
_INTEGERS = ("n_shots", "n", "n_failed", "n_unselected")


def compare(frame: pd.DataFrame, rule: str = "best_dev", families: Iterable[Family] | None = None) -> pd.DataFrame:
    """Summarize the report trials of each cell, in and out of domain, with a majority-class row for each model and task.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`).
        families: `analysis.stats.build_families(frame, rule)`, where the caller has them already.

    Returns:
        One row for each cell, sorted by model, task, n_shots, method, pattern. Raw numbers: scores in [0, 1] (accuracies, for
        classification).
        Columns: the cell; `rule`, `is_oracle`; `n` finished trials, `n_failed` failed ones, `n_unselected` finished ones without
        a checkpoint under the rule; for `in_domain` and `out_of_domain` the `_set`, and of its score `_mean`, `_sd` (divisor
        n - 1, NaN for one trial), `_max` and `_half_width` (of the 95 % t-interval, NaN for fewer than three trials and where all
        have the same score); `gap_mean`;
        `metric`, what the scores are; `in_domain_top` and `out_of_domain_top`: no method at these shots is significantly better
        (`analysis.stats.comparisons`), false where there is nothing to compare with;
        `findings`: warnings of the trials, as "code@set 3/6; ...", out of `n`.
        Majority rows have `method` 'majority_class', no pattern and no `n`. Without report trials the table is empty.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    report = frame[(frame["stage"] == "report") & (frame["status"] != "unreadable")]
    rows = []
    for cell, trials in group_by(report, CELL, sort=False):
        of_cell = chosen.loc[chosen.index.intersection(trials.index)]
        done = of_cell[of_cell["status"] == "finished"]
        n_finished = trials.loc[trials["status"] == "finished", "digest"].nunique()
        rows.append(
            dict(zip(CELL, cell, strict=True))
            | {"n": len(done), "n_failed": int((of_cell["status"] == "failed").sum()), "n_unselected": n_finished - len(done)}
            | _numbers(done)
            | {"metric": next(iter(done["metric"].dropna()), None), "gap_mean": done["gap"].mean()}
            | {"findings": _count_findings(done)}
        )
    rows += _majority_rows(report)
    names = [*CELL, "rule", "is_oracle", "metric", "n", "n_failed", "n_unselected"]
    names += [f"{prefix}_{name}" for prefix in DOMAINS for name in ("set", *_STATISTICS)]
    table = pd.DataFrame(rows, columns=[*names, "gap_mean", "findings"])
    unbeaten = _unbeaten(build_families(frame, rule) if families is None else families)
    for domain in DOMAINS:
        table[f"{domain}_top"] = [(domain, *cell) in unbeaten for cell in table[CELL].itertuples(index=False, name=None)]
    table["rule"], table["is_oracle"] = rule, rule in ORACLES
    names = ["model", "task", "method", "pattern", "metric", "findings", "in_domain_set", "out_of_domain_set"]
    texts = dict.fromkeys(names, "str")
    table = table.astype(texts | dict.fromkeys(_INTEGERS, "Int64"))
    return table.sort_values(_ORDER, key=_reading_order, kind="stable").reset_index(drop=True)


def _reading_order(column: pd.Series) -> pd.Series:
    """Baselines before methods; models by the size in their names, those without one last."""
    if column.name == "model":
        return column.map(lambda name: f"{model_size(name):016.0f} {name}")
    return column.where(column != MAJORITY, "") if column.name == "method" else column


def compare_groups(frame: pd.DataFrame, rule: str = "best_dev") -> pd.DataFrame:
    """Summarize the accuracy by group (a heuristic, a subcase), for every test set that has groups.

    Returns:
        One row for each cell and value of a grouping: the cell, `set`, `domain`, `group`, `value`, `n` trials, `mean`, `sd`,
        `max`, `half_width` as in `compare`. Empty where no set has groups.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    done = chosen[chosen["status"] == "finished"]
    rows = []
    for cell, trials in group_by(done.sort_values(_ORDER, kind="stable"), CELL, sort=False):
        for name, domain, group, value in _groups(trials):
            accuracy = trials[f"{name}_{group}_{value}_accuracy"]
            where = {"set": name, "domain": domain, "group": group, "value": value, "n": int(accuracy.notna().sum())}
            rows.append(dict(zip(CELL, cell, strict=True)) | where | describe(accuracy))
    return pd.DataFrame(rows, columns=[*CELL, "set", "domain", "group", "value", "n", *_STATISTICS])


def describe(values: pd.Series) -> dict[str, float]:
    """Compute mean, sd, maximum and half width of the 95 % t-interval of the mean, over what is not missing; NaN where there is none."""
    numbers = values.to_numpy(dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    n = len(numbers)
    return {
        "mean": float(numbers.mean()) if n else math.nan,
        "sd": float(numbers.std(ddof=1)) if n > 1 else math.nan,
        "max": float(numbers.max()) if n else math.nan,
        "half_width": shown_half_width(numbers),
    }


def _numbers(trials: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for prefix in DOMAINS:
        row[f"{prefix}_set"] = next(iter(trials[f"{prefix}_set"].dropna()), None)
        row |= {f"{prefix}_{name}": value for name, value in describe(trials[f"{prefix}_score"]).items()}
    return row


def _count_findings(trials: pd.DataFrame) -> str | None:
    counts: Counter[str] = Counter()
    for details in trials["finding_details"].dropna():
        warnings = [finding for finding in json.loads(details) if finding["severity"] != "note"]
        counts.update(
            {f"{warning['code']}@{warning['set']}" if warning["set"] else warning["code"] for warning in warnings}
        )  # once a trial
    return "; ".join(f"{code} {count}/{len(trials)}" for code, count in sorted(counts.items())) or None


def _majority_rows(report: pd.DataFrame) -> Iterator[dict[str, Any]]:
    known = report["in_domain_majority"].notna() | report["out_of_domain_majority"].notna()
    done = report[known & (report["metric"] == "accuracy")]  # a share is no baseline for another metric
    for (model, task), trials in group_by(done, ["model", "task"], sort=False):
        row: dict[str, Any] = {"model": model, "task": task, "method": MAJORITY, "n_shots": 0, "pattern": ""}
        for prefix in DOMAINS:
            share = trials[f"{prefix}_majority"].mean()  # the same for all, or `mixed_test_sets` says otherwise
            row |= {
                f"{prefix}_set": next(iter(trials[f"{prefix}_set"].dropna()), None),
                f"{prefix}_mean": share,
                f"{prefix}_max": share,
            }
        yield row | {"gap_mean": row["in_domain_mean"] - row["out_of_domain_mean"], "metric": "accuracy"}


def _unbeaten(families: Iterable[Family]) -> set[tuple]:
    """(domain, *cell) of every method with shots that none at the same number of shots is shown to beat."""
    return {
        (family.domain, family.model, family.task, sample.method, sample.n_shots, sample.pattern)
        for family in families
        if len(family.samples) > 1
        for sample in family.samples
        if sample.n_shots and not family.beaten(sample)
    }


def _groups(trials: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """(set, domain, group, value) of every grouping in these trials, each once."""
    groups: dict[tuple[str, str, str, str], None] = {}
    for text in trials["sets"].dropna().unique():
        for name, shape in json.loads(text).items():
            for group, values in shape["groups"].items():
                groups |= dict.fromkeys((name, shape["domain"], group, value) for value in values)
    return list(groups)
