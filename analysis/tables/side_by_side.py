"""Compare two sets of results cell by cell: one's own before and after a change, or one's own and the published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames import CELL, DOMAINS, differing_conditions, group_by, select
from analysis.stats import FEWEST, Difference, holm, one_sample, shown_half_width, welch
from analysis.tables.formatting import interval, metric_name, p_entry, p_text, percent, unit
from analysis.tables.text_table import TextTable
from llmft.errors import UserError
from llmft.seeds import SEED_FIELDS

if TYPE_CHECKING:
    import pandas as pd

    Key = tuple[Any, ...]  # the values of CELL
    Cells = dict[Key, pd.DataFrame]


def compare_runs(ours: pd.DataFrame, theirs: pd.DataFrame, rule: str = "best_dev", other_rule: str | None = None) -> pd.DataFrame:
    """Compare every cell of two frames, one row for each domain; a cell that only one of them has is a row too.

    Cells meet when task, shots and pattern are the same, the models have the same last part of their names ('facebook/opt-125m' and
    '/models/opt-125m'), and the methods the same name or, failing that, are the same method under two names. Trials of the same
    seed that drew the same examples are paired (t-test), others compared by Welch's test; p is corrected over the table (Holm).

    Args:
        ours, theirs: from `analysis.load` or `analysis.load_published`.
        rule: which checkpoint counts.
        other_rule: the same for `theirs`; None: `rule`, or 'last' where `theirs` has no checkpoint under `rule`.

    Returns:
        The cell as in `ours`, `other_method`, `domain`, `set`, `other_set`, `metric`; `n`, `mean`, `half_width` and `other_n`,
        `other_mean`, `other_half_width`; `difference` (ours minus theirs), `low`, `high`, `p`, `p_holm`, `test`, `n_compared` (pairs,
        or the smaller n); `status`: 'both', 'ours only', 'theirs only', 'another set', 'no result'; `differs`: conditions that
        are known of both and not the same; `rule`, `other_rule`, and `is_oracle` where either looks at the reported sets.

    Raises:
        UserError: there is no such rule; the two have no model, task and method in common.
    """
    import pandas as pd

    if other_rule is None:
        other_rule = rule if (theirs["selection"] == rule).any() or not (theirs["selection"] == "last").any() else "last"
    a, b = (_cells(select(frame, name)) for frame, name in ((ours, rule), (theirs, other_rule)))
    pairs = list(_pair(a, b))
    if not any(mine is not None and other is not None for _, _, mine, other in pairs):
        raise UserError(
            f"nothing in common: one has {_describe(a)}; the other has {_describe(b)}. A cell is model, task, method, shots, pattern."
        )
    rows = [
        _row(cell, other_method, mine, other, domain) | {"rule": rule, "other_rule": other_rule}
        for cell, other_method, mine, other in pairs
        for domain in DOMAINS
    ]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].to_numpy()))


def comparison_sentences(table: pd.DataFrame, our_name: str, their_name: str) -> Iterator[str]:
    """Write a sentence for each cell of both: '..., 16 shots, in domain: 53.1 ± 1.2 % in a, 52.9 ± 1.4 % in b (+0.2, p = .8)'."""
    for row in table[table["status"] == "both"].to_dict("records"):
        share = unit(row["metric"])
        cell = f"{row['model']}, {row['task']}, {row['method']}, {row['n_shots']} shots, {row['pattern']}"
        where = f"{cell}, {row['domain'].replace('_', ' ')} ({row['set']})"
        mine = f"{interval(row['mean'], row['half_width'])}{share} in {our_name}"
        other = f"{interval(row['other_mean'], row['other_half_width'])}{share} in {their_name}"
        p = p_text(row["p_holm"] if row["n_compared"] >= FEWEST else math.nan)
        yield f"{where}: {mine}, {other} ({', '.join(filter(None, (percent(row['difference'], signed=True), p, _common(row))))})"


def comparison_table(compared: pd.DataFrame, our_name: str, their_name: str) -> TextTable:
    """Show our cells; `comparison_notes` says what is the same in all of them, and which cells only the other has."""
    rows = compared[compared["status"] != "theirs only"]
    where = {"model": "model", "task": "task", "method": "method", "n_shots": "shots", "pattern": "pattern", "domain": "domain"}
    where = {column: name for column, name in where.items() if column in ("method", "domain") or rows[column].nunique() > 1}
    n = len(where)
    table = TextTable(
        [*where.values(), our_name, "n", their_name, "n", "difference", "p", "note"],
        numeric=(*(i for i, name in enumerate(where) if name == "n_shots"), *range(n, n + 6)),
    )
    for row in rows.to_dict("records"):
        note = {"both": _common(row), "another set": f"sets {row['set']}, {row['other_set']}", "ours only": f"not in {their_name}"}
        p = p_entry(row["p_holm"], row["n_compared"])
        names = {**row, "domain": row["domain"].replace("_", " ")}
        if row["method"] != row["other_method"]:
            names["method"] = f"{row['method']} ({row['other_method']})"
        table.rows.append([
            *(str(names[column]) for column in where), interval(row["mean"], row["half_width"]), str(row["n"]),
            interval(row["other_mean"], row["other_half_width"]), str(row["other_n"]), percent(row["difference"], signed=True), p,
            note.get(row["status"], row["status"]),
        ])  # fmt: skip
    return table


def comparison_notes(table: pd.DataFrame, our_name: str, their_name: str) -> Iterator[str]:
    """Write notes on the comparison: where conditions differ, and what only one of the two has."""
    ours = table[table["status"] != "theirs only"]
    same = {name: ours[name].iloc[0] for name in ("model", "task", "n_shots", "pattern") if ours[name].nunique() == 1}
    if same:
        yield ", ".join(f"{name.removeprefix('n_')} {value}" for name, value in same.items())
    for differs, rows in table[table["differs"] != ""].groupby("differs"):
        cells = rows.drop_duplicates(CELL)
        methods = ", ".join(sorted(set(cells["method"])))
        yield f"{our_name} and {their_name} differ in {differs} in {_count(len(cells))} ({methods})"
    tests = set(table.loc[table["status"] == "both", "test"])
    if "welch" in tests:
        yield "no shared draws in some cells: those differences are tested by Welch's test, not in pairs"
    if any(_common(row) for row in table.to_dict("records")):
        yield "means are over all seeds of each, differences over the common seeds: they need not agree"
    if n := len(table[table["status"] == "theirs only"].drop_duplicates(CELL)):
        yield f"{_count(n)} only in {their_name}"


def comparison_title(table: pd.DataFrame, our_name: str, their_name: str) -> str:
    """Write the title of the table: the metric, and which checkpoints."""
    oracle = " (an oracle: it looks at the reported sets)" if table["is_oracle"].any() else ""
    rules = {our_name: table["rule"].iloc[0], their_name: table["other_rule"].iloc[0]}
    chosen = " and ".join(f"{rule} in {name}" for name, rule in rules.items())
    metric = metric_name(table["metric"])
    return f"{metric[0].upper()}{metric[1:]} (± 95 % interval); checkpoints: {chosen}{oracle}; p by Holm over the table"


def _cells(chosen: pd.DataFrame) -> Cells:
    return dict(group_by(chosen[chosen["status"] != "unreadable"], CELL))


def _pair(a: Cells, b: Cells) -> Iterator[tuple[Key, str, pd.DataFrame | None, pd.DataFrame | None]]:
    """Yield (cell, name of the other's method, our trials, their trials); None where one has no such cell."""
    used: set[Key | None] = set()
    for cell, mine in a.items():
        alike = [key for key in b if _without_method(key) == _without_method(cell)]
        other = next((key for key in alike if key[2] == cell[2]), None)
        base = mine["base_method"].iloc[0]
        other = other or next((key for key in alike if b[key]["base_method"].iloc[0] == base), None)
        used.add(other)
        yield cell, other[2] if other else cell[2], mine, b[other] if other else None
    for cell, theirs in b.items():
        if cell not in used:
            yield cell, cell[2], None, theirs


def _without_method(cell: Key) -> Key:
    model, task, _, n_shots, pattern = cell
    return short_name(model), task, n_shots, pattern


def short_name(model: str) -> str:
    """Shorten a model's name to what different names of it share: 'opt-125m' for 'facebook/opt-125m' and '/models/OPT-125m/'."""
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _row(cell: Key, other_method: str, mine: pd.DataFrame | None, other: pd.DataFrame | None, domain: str) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(CELL, cell, strict=True)) | {"other_method": other_method, "domain": domain}
    sides = []
    for prefix, trials in (("", mine), ("other_", other)):
        done = None if trials is None else trials[trials[f"{domain}_score"].notna()]
        scores = np.array([]) if done is None else done[f"{domain}_score"].to_numpy(float)
        row[f"{prefix}set"] = next(iter(done[f"{domain}_set"].dropna()), None) if done is not None else None
        row |= {f"{prefix}n": len(scores), f"{prefix}mean": float(scores.mean()) if len(scores) else math.nan}
        row[f"{prefix}half_width"] = shown_half_width(scores)
        sides.append(done)
    known = [side for side in sides if side is not None]
    metrics = [next(iter(side["metric"].dropna()), None) for side in known if len(side)]
    row["metric"] = metrics[0] if metrics else None
    row["is_oracle"] = any(bool(side["is_oracle"].any()) for side in known)
    row["status"], difference = _status(row, mine, other, metrics), Difference(math.nan, math.nan, math.nan, math.nan, 0, "")
    if row["status"] == "both":
        difference = _difference(known[0], known[1], f"{domain}_score")
    mean, low, high, p, n, test = difference
    row |= {"difference": mean, "low": low, "high": high, "p": p, "test": test, "n_compared": n}
    differing = _differing(mine, other) if mine is not None and other is not None else []
    if row["status"] == "both" and len({frozenset(_sizes(side, row["set"])) for side in known} - {frozenset()}) > 1:
        differing.append("n_test")
    row["differs"] = ", ".join(differing)
    return row


def _status(row: dict[str, Any], mine: pd.DataFrame | None, other: pd.DataFrame | None, metrics: list) -> str:
    if mine is None or other is None:
        return "theirs only" if mine is None else "ours only"
    if not row["n"] or not row["other_n"]:
        return "no result"
    return "both" if row["set"] == row["other_set"] and len(set(metrics)) == 1 else "another set"


def _difference(mine: pd.DataFrame, other: pd.DataFrame, score: str) -> Difference:
    """Paired where both drew the same examples with the same seeds, by Welch's test otherwise."""
    keys = [*SEED_FIELDS, "shots_hash"]
    known = [frame.dropna(subset=["data_seed", "shots_hash"]).drop_duplicates(keys) for frame in (mine, other)]
    both = known[0][[*keys, score]].merge(known[1][[*keys, score]], on=keys)
    if len(both) > 1:
        return one_sample((both[f"{score}_x"] - both[f"{score}_y"]).to_numpy())
    return welch(mine[score].to_numpy(), other[score].to_numpy())


def _sizes(trials: pd.DataFrame, name: str) -> set[int]:
    """How many examples of a set were scored; empty where that is not known."""
    shapes = [json.loads(text).get(name, {}) for text in trials["sets"].dropna().unique()]
    return {shape["n"] for shape in shapes if "n" in shape}


def _common(row: Mapping[Hashable, Any]) -> str:
    """'on 3 common seeds' where a difference is taken over fewer trials than one of its means."""
    fewer = row["test"] == "paired" and row["n_compared"] < max(row["n"], row["other_n"])
    return f"on {row['n_compared']} common seeds" if fewer else ""


def _differing(mine: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    def differs(values: Callable[[pd.DataFrame], pd.Series]) -> bool:
        a, b = set(values(mine).dropna()), set(values(other).dropna())
        return bool(a and b) and a != b

    return differing_conditions(differs)


def _count(n: int) -> str:
    return f"{n} cell{'' if n == 1 else 's'}"


def _describe(cells: Cells) -> str:
    names = sorted({f"{method} on {task} with {model}" for model, task, method, *_ in cells})
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "no report trials"
