"""A few labelled out-of-domain examples: choosing checkpoints by them, and how well they stand for the whole set."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

from analysis.frames.loading import load
from analysis.frames.predictions import example_scores, shared_examples
from llmft.errors import UserError
from llmft.records import StoragePath
from llmft.seeds import stream

if TYPE_CHECKING:
    import pandas as pd


def load_for_rule(root: str | StoragePath, rule: str) -> tuple[pd.DataFrame, list[str]]:
    """`analysis.load`, with the rows of `rule` added where it is 'best_on_<n>' (`best_on_examples`); and what could not be read.

    Raises:
        UserError: as `analysis.load`; no trial has so many answers.
    """
    frame, named = load(root), re.fullmatch(r"best_on_([1-9]\d*)", rule)
    if not named:
        return frame, []
    frame, problems = few_label_selection(root, frame, int(named[1]))
    if not (frame["selection"] == rule).any():
        why = "; ".join(problems[:3]) or "no finished trial left answers on an out-of-domain set"
        raise UserError(f"{root}: no checkpoint can be chosen by '{rule}' ({why}). Take another rule or fewer examples.")
    return frame, problems


def few_label_selection(root: str | StoragePath, frame: pd.DataFrame, n: int = 50, seed: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """The frame with one more rule: of the checkpoints that a trial kept, the one that is best on `n` out-of-domain examples.

    What exactly: of the headline out-of-domain set `n` examples are drawn with this seed, the same for every trial; each trial's
    kept checkpoints are scored on them, and the best is taken (the better on dev among equals). Its out-of-domain score is that on
    the remaining examples alone, so no example both selects and counts; the row of a trial without checkpoints is scored on the
    same remaining ones. In-domain numbers are the chosen checkpoint's, and other measures of the out-of-domain set are missing.
    The choice is among the checkpoints on record ('last', 'best_dev', ...), not among all epochs. Where one of them was itself
    chosen on the reported sets, the row is an oracle.

    Returns:
        `frame` with rows of `selection` 'best_on_<n>' added for every report trial that left answers, and what could not be read.
    """
    import pandas as pd

    rule = f"best_on_{n}"
    done = frame[(frame["stage"] == "report") & (frame["status"] == "finished") & frame["out_of_domain_set"].notna()]
    added, problems = [], {}
    for set_name, trials in done.groupby("out_of_domain_set"):
        tables = {}
        for selection, of_rule in trials.groupby("selection"):
            tables[selection], unread = example_scores(root, of_rule, set_name)
            problems |= dict.fromkeys(unread)
        ids = shared_examples(tables.values())
        if len(ids) <= n:
            if ids:
                problems |= {f"{set_name}: {len(ids)} examples with answers are too few to choose by {n} and report on others": None}
            continue
        drawn = {ids[i] for i in stream(seed, f"best_on/{set_name}").choice(len(ids), n, replace=False)}
        picked, rest = sorted(drawn), [id_ for id_ in ids if id_ not in drawn]
        for _, kept in trials.groupby("digest"):
            kept = kept[[digest in tables[s].index for digest, s in zip(kept["digest"], kept["selection"], strict=True)]]
            if kept.empty:
                continue
            places = zip(kept["digest"], kept["selection"], strict=True)
            on_picked = [float(tables[s].loc[digest, picked].sum()) for digest, s in places]
            order = sorted(range(len(kept)), key=lambda i: (-on_picked[i], -_or_zero(kept["dev_score"].iloc[i]), i))
            added.append(_rescored(kept.iloc[order[0]], rule, tables, rest, bool(kept["is_oracle"].any())))
    grown = pd.concat([frame, pd.DataFrame(added)], ignore_index=True) if added else frame
    return grown.astype(frame.dtypes.to_dict()), list(problems)


def _or_zero(value: float) -> float:
    return 0.0 if np.isnan(value) else float(value)


def _rescored(row: pd.Series, rule: str, tables: dict[str, pd.DataFrame], rest: list[str], is_oracle: bool) -> pd.Series:
    set_name, score = row["out_of_domain_set"], float(tables[row["selection"]].loc[row["digest"], rest].mean())
    row = row.copy()
    known = ("_set", "_majority", "_majority_share")  # of the whole set, which a random part of it resembles
    stale = [name for name in row.index if name.startswith(("out_of_domain_", f"{set_name}_")) and not name.endswith(known)]
    row[stale] = np.nan
    row["selection"], row["is_oracle"] = rule, is_oracle
    row["out_of_domain_score"] = row[f"{set_name}_score"] = score
    row[f"{set_name}_n"] = float(len(rest))
    if row["metric"] == "accuracy":
        row["out_of_domain_accuracy"] = row[f"{set_name}_accuracy"] = score
    sets = json.loads(row["sets"])
    sets[set_name] |= {"n": len(rest), "groups": {}}
    row["sets"] = json.dumps(sets)
    row["gap"] = row["in_domain_score"] - score
    return row
