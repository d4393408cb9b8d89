"""The answer in one sentence for each model and task, no surer than the intervals allow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.layout import TITLES, percent, tallies
from analysis.tables import MAJORITY

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answer:
    """Which method is best for one model and task. `sure` tells for each sentence whether the intervals allow one to say so."""

    model: str
    task: str
    in_domain: str
    out_of_domain: str
    in_domain_sure: bool
    out_of_domain_sure: bool


@dataclass(frozen=True)
class _Candidate:
    method: str
    mean: float
    half_width: float
    warnings: str = ""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def name(self) -> str:
        return "the majority class" if self.method == MAJORITY else self.method

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{percent(self.mean)} % in a single trial"
        low, high = percent(max(self.low, 0.0)), percent(min(self.high, 1.0))
        return f"{percent(self.mean)} %" + (f" ({low} to {high})" if self.half_width else "")


def headline(comparison: pd.DataFrame) -> list[Answer]:
    """The best method of each model and task by mean accuracy, in and out of domain.

    Methods are compared at the number of shots that most of them were tried with (the largest of those, if several), each with
    its best pattern; zero-shot and the majority class always stand beside them. Where the 95 % t-intervals of the best and the
    second overlap, or one of them has a single seed, the sentence says that one cannot tell. Warnings on the best number are said
    with it, and nothing is sure that carries one.

    Args:
        comparison: from `analysis.compare`.
    """
    answers = []
    for (model, task), rows in comparison.groupby(["model", "task"], sort=False):
        shots = _common_shots(rows)
        at_shots = rows[rows["n_shots"].isin([0, shots])]
        (inside, sure_inside), (outside, sure_outside) = (_sentence(at_shots, shots, prefix) for prefix in TITLES)
        answers.append(Answer(model, task, inside, outside, sure_inside, sure_outside))
    return answers


def _common_shots(rows: pd.DataFrame) -> int:
    """The number of shots with the most methods; the largest of equals, 0 where nothing has shots."""
    counts = rows[(rows["n_shots"] > 0) & (rows["n"] > 0)].groupby("n_shots")["method"].nunique()
    return max(((count, int(shots)) for shots, count in counts.items()), default=(0, 0))[1]


def _candidates(rows: pd.DataFrame, prefix: str) -> Iterator[_Candidate]:
    ranked = rows[rows[f"{prefix}_mean"].notna()].sort_values(f"{prefix}_mean", ascending=False, kind="stable")
    for _, row in ranked.drop_duplicates("method").iterrows():
        half_width = row[f"{prefix}_half_width"]
        if row["n_shots"] == 0 and math.isnan(half_width):
            half_width = 0.0  # nothing was drawn: there is no spread over seeds to speak of
        warnings = [str(each) for each in tallies(row["findings"]) if each.set in ("", row[f"{prefix}_set"])]
        yield _Candidate(row["method"], row[f"{prefix}_mean"], half_width, "; ".join(warnings))


def _sentence(rows: pd.DataFrame, shots: int, prefix: str) -> tuple[str, bool]:
    name = next(iter(rows[f"{prefix}_set"].dropna()), None)
    inside = ", ".join([*([name] if name else []), *(["checkpoints chosen by an oracle"] if rows["is_oracle"].any() else [])])
    where = f"{TITLES[prefix]}{f' ({inside})' if inside else ''},"
    candidates = list(_candidates(rows, prefix))
    if not [each for each in candidates if each.method != MAJORITY]:
        return f"{where} there is no result.", False
    at = f" at {shots} shots" if shots else ""
    best, second = candidates[0], candidates[1] if len(candidates) > 1 else None
    caution = f" The number of {best.name} carries a warning: {best.warnings}." if best.warnings else ""
    if second is None:
        return f"{where} {best.name} reaches {best}{at}; there is nothing to compare it with.{caution}", False
    if best.method == MAJORITY:
        beaten = f"no method beats the majority class ({percent(best.mean)} %){at}"
        return f"{where} {beaten}; the nearest is {second.name} with {second}.", False
    if best.low > second.high:  # false where an interval is unknown
        return f"{where} {best.name} is best{at}: {best}, ahead of {second.name} with {second}.{caution}", not caution
    why = "the intervals overlap" if not math.isnan(best.half_width + second.half_width) else "a single seed has no interval"
    lead = f"{best.name} leads with {best}, {second.name} follows with {second}; {why}."
    return f"{where} one cannot tell which method is best{at}: {lead}{caution}", False
