"""Compare methods example by example: intervals over seeds and test examples at once, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames import DOMAINS, common_shots, example_scores, group_by, select
from analysis.stats.comparisons import pairing_seed
from analysis.stats.significance import ALPHA, FEWEST, bootstrap_difference, holm, mcnemar
from llmft.records import StoragePath

if TYPE_CHECKING:
    import pandas as pd


_COLUMNS = (
    *("model", "task", "n_shots", "domain", "set", "a", "a_pattern", "b", "b_pattern", "n_seeds", "n_examples"),
    *("difference", "low", "high", "only_a", "only_b", "n_mcnemar"),
)


def example_contrasts(root: str | StoragePath, frame: pd.DataFrame, rule: str = "best_dev") -> tuple[pd.DataFrame, list[str]]:
    """Compare the method with the best mean with each other one, example by example, at the most common number of shots.

    Returns:
        One row for each model, task, number of shots, domain and other method: `a` the best, `b` the other; `n_seeds` (pairs; a
        method without seeds stands in each), `n_examples`; `difference` of the mean scores with its two-level bootstrap interval
        `low`, `high` (`analysis.stats.significance.bootstrap_difference`: other seeds and other examples; NaN for fewer than three
        pairs); for right and wrong answers `only_a` and `only_b`, how many examples only that side has right (means over the
        seeds), and `n_mcnemar`, the seeds whose McNemar test is significant (p < .05, Holm over the seeds). And what could not be
        read, a line each.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    done = chosen[(chosen["status"] == "finished") & chosen["data_seed"].notna()]
    rows: list[dict[str, Any]] = []
    problems: dict[str, None] = {}
    for domain in DOMAINS:
        scored = done[done[f"{domain}_score"].notna()]
        for (model, task, set_name), trials in group_by(scored, ["model", "task", f"{domain}_set"]):
            n_shots = common_shots(trials)
            trials = trials[trials["n_shots"].isin([0, n_shots])]
            by_cell = ["method", "pattern", "n_shots"]
            if len(trials.drop_duplicates(by_cell)) < 2:
                continue  # nothing to stand beside, so its answers need not be read
            scores, unread = example_scores(root, trials, set_name)
            problems |= dict.fromkeys(unread)
            cells, seed = {}, pairing_seed(trials)
            for key, cell in group_by(trials[trials["digest"].isin(scores.index)], by_cell):
                by_seed = cell.drop_duplicates(seed).set_index(seed)["digest"]
                cells[key] = scores.loc[by_seed.to_numpy()].set_index(by_seed.index.astype(int))
            where = dict(zip(_COLUMNS, (model, task, n_shots, domain, set_name), strict=False))
            rows += [where | row for row in _against_best(cells)]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).assign(rule=rule), list(problems)


def _against_best(cells: dict[tuple[Any, ...], pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """One row for each cell but the one with the best mean; `cells` are scores  # [seeds, examples], by method, pattern, n_shots."""
    if len(cells) < 2:
        return
    means = {key: float(scores.to_numpy().mean()) for key, scores in cells.items()}
    best = max(means, key=lambda key: means[key])
    for other in sorted(cells, key=lambda key: -means[key]):
        if other == best:
            continue
        a, b = _paired(best, cells[best], other, cells[other])
        if not len(a):
            continue
        low, high = bootstrap_difference(a - b) if len(a) >= FEWEST else (math.nan, math.nan)
        row = {"a": best[0], "a_pattern": best[1], "b": other[0], "b_pattern": other[1], "n_seeds": len(a)}
        row |= {"n_examples": a.shape[1], "difference": float((a - b).mean()), "low": low, "high": high}
        if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
            tests = [mcnemar(of_a, of_b) for of_a, of_b in zip(a, b, strict=True)]
            only_a, only_b, p = zip(*tests, strict=True)
            row |= {"only_a": np.mean(only_a), "only_b": np.mean(only_b), "n_mcnemar": int((holm(p) < ALPHA).sum())}
        yield row


def _paired(a_key: tuple, a: pd.DataFrame, b_key: tuple, b: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return both methods' scores  # [seeds, examples] of the same seeds; one without seeds (no shots) is repeated for each seed."""
    if a_key[2] == 0 and len(a) == 1:
        return np.repeat(a.to_numpy(), len(b), 0), b.to_numpy()
    if b_key[2] == 0 and len(b) == 1:
        return a.to_numpy(), np.repeat(b.to_numpy(), len(a), 0)
    shared = a.index.intersection(b.index)
    return a.loc[shared].to_numpy(), b.loc[shared].to_numpy()
