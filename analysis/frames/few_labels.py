"""Select checkpoints by a few labelled out-of-domain examples."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames.loading import load
from analysis.frames.predictions import example_scores, shared_examples
from llmft.errors import UserError
from llmft.records import StoragePath
from llmft.seeds import stream

if TYPE_CHECKING:
    import pandas as pd


def load_for_rule(root: str | StoragePath, rule: str) -> tuple[pd.DataFrame, list[str]]:
    """Load a frame that has the rows of `rule`, also where that is 'best_on_<n>' (`few_label_selection`).

    Returns:
        The frame, and what could not be read, a line each.

    Raises:
        UserError: as `analysis.load`; no trial has so many answers.
    """
    frame, n_examples = load(root), re.fullmatch(r"best_on_([1-9]\d*)", rule)
    if not n_examples:
        return frame, []
    frame, problems = few_label_selection(root, frame, int(n_examples[1]))
    if not (frame["selection"] == rule).any():
        why = "; ".join(problems[:3]) or "no finished trial left answers on an out-of-domain set"
        raise UserError(f"{root}: no checkpoint can be chosen by '{rule}' ({why}). Take another rule or fewer examples.")
    return frame, problems


def few_label_selection(root: str | StoragePath, frame: pd.DataFrame, n: int = 50, seed: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """Add the rule 'best_on_<n>': of the checkpoints that a trial kept, the one that is best on `n` out-of-domain examples.

    Of the headline out-of-domain set `n` examples are drawn with this seed, the same for every trial; each trial's kept checkpoints
    are scored on them, and the best is taken (the better on dev among equals). Its out-of-domain score is that on the remaining
    examples alone, so that no example both selects and counts; a trial without checkpoints is scored on the same remaining ones.
    In-domain numbers are the chosen checkpoint's, and other measures of the out-of-domain set are missing. The choice is among the
    checkpoints on record ('last', 'best_dev', ...), not among all epochs. Where one of them was itself chosen on the reported sets,
    the row is an oracle.

    Returns:
        `frame` with rows of `selection` 'best_on_<n>' added for every report trial that left answers, and what could not be read.
    """
    import pandas as pd

    done = frame[(frame["stage"] == "report") & (frame["status"] == "finished") & frame["out_of_domain_set"].notna()]
    added: list[pd.Series] = []
    problems: dict[str, None] = {}
    for set_name, trials in done.groupby("out_of_domain_set"):
        scores = {}
        for selection, of_rule in trials.groupby("selection"):
            scores[selection], unread = example_scores(root, of_rule, str(set_name))
            problems |= dict.fromkeys(unread)
        ids = shared_examples(scores.values())
        if len(ids) <= n:
            if ids:
                problems |= {f"{set_name}: {len(ids)} examples with answers are too few to choose by {n} and report on others": None}
            continue
        drawn = {ids[i] for i in stream(seed, f"best_on/{set_name}").choice(len(ids), n, replace=False)}
        reported = [id_ for id_ in ids if id_ not in drawn]
        for _, checkpoints in trials.groupby("digest"):
            answered = [row["digest"] in scores[row["selection"]].index for _, row in checkpoints.iterrows()]
            if any(answered):
                best = _best_checkpoint(checkpoints[answered], scores, sorted(drawn))
                is_oracle = bool(checkpoints[answered]["is_oracle"].any())
                added.append(_rescored(best, f"best_on_{n}", is_oracle, scores[best["selection"]].loc[best["digest"], reported]))
    grown = pd.concat([frame, pd.DataFrame(added)], ignore_index=True) if added else frame
    return grown.astype(frame.dtypes.to_dict()), list(problems)


def _best_checkpoint(checkpoints: pd.DataFrame, scores: dict[Any, pd.DataFrame], examples: list[str]) -> pd.Series:
    """Return the row of the checkpoint with the best score on `examples`; the better on dev among equals, then the first."""
    on_examples = [float(scores[row["selection"]].loc[row["digest"], examples].sum()) for _, row in checkpoints.iterrows()]
    on_dev = checkpoints["dev_score"].fillna(0.0).tolist()
    return checkpoints.iloc[min(range(len(checkpoints)), key=lambda i: (-on_examples[i], -on_dev[i], i))]


def _rescored(row: pd.Series, rule: str, is_oracle: bool, scores: pd.Series) -> pd.Series:
    """Copy `row` as one of `rule`, its out-of-domain score the mean of `scores`  # [examples]."""
    set_name, score = row["out_of_domain_set"], float(scores.mean())
    row = row.copy()
    known = ("_set", "_majority", "_majority_share")  # of the whole set, which a random part of it resembles
    stale = [name for name in row.index if name.startswith(("out_of_domain_", f"{set_name}_")) and not name.endswith(known)]
    row[stale] = np.nan
    row["selection"], row["is_oracle"] = rule, is_oracle
    row["out_of_domain_score"] = row[f"{set_name}_score"] = score
    row[f"{set_name}_n"] = float(len(scores))
    if row["metric"] == "accuracy":
        row["out_of_domain_accuracy"] = row[f"{set_name}_accuracy"] = score
    sets = json.loads(row["sets"])
    sets[set_name] |= {"n": len(scores), "groups": {}}
    row["sets"] = json.dumps(sets)
    row["gap"] = row["in_domain_score"] - score
    return row
