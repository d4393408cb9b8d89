"""The answer in one sentence for each model and task and domain, no surer than the paired comparisons allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.contrasts import MAJORITY, Contrast, Family, Sample, families
from analysis.layout import TITLES, metric_name, percent, tallies, unit
from analysis.stats import ALPHA, half_width
from analysis.tables import compare
from llmft.spec import ORACLES

if TYPE_CHECKING:
    import pandas as pd


_NAMED = 6  # of more methods that cannot be told apart only the first are named; the ranking has all


@dataclass(frozen=True)
class Answer:
    """Which method is best for one model and task. `sure` tells for each sentence whether the comparisons allow one to say so."""

    model: str
    task: str
    in_domain: str
    out_of_domain: str
    in_domain_sure: bool
    out_of_domain_sure: bool


def headline(frame: pd.DataFrame, rule: str = "best_dev") -> list[Answer]:
    """The best method of each model and task by mean score, in and out of domain.

    Methods are compared at the number of shots that most of them were tried with (the largest of those, if several); zero-shot
    prompting and the majority class always stand beside them. A method is called best only if it is significantly better than every
    other: differences paired by seed, t-test, p corrected for all pairs (`analysis.contrasts`). Otherwise the sentence names those
    that one cannot tell from the best. Warnings on the best number are said with it, and nothing is sure that carries one.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.RULES`).

    Raises:
        UserError: there is no such rule.
    """
    found = families(frame, rule)
    return answer(compare(frame, rule, found), found, rule)


def answer(comparison: pd.DataFrame, found: list[Family], rule: str) -> list[Answer]:
    """`headline`, from `analysis.compare` and `analysis.families`."""
    answers = []
    for (model, task), rows in comparison.groupby(["model", "task"], sort=False):
        here = [family for family in found if (family.model, family.task) == (model, task)]
        sentences = [_sentence(rows, [each for each in here if each.domain == domain], domain, rule) for domain in TITLES]
        (inside, sure_inside), (outside, sure_outside) = sentences
        answers.append(Answer(model, task, inside, outside, sure_inside, sure_outside))
    return answers


def main_family(found: list[Family]) -> Family:
    """The family that the answer speaks of: the one with the most methods, and of those the one with the most shots."""
    return max(found, key=lambda each: (len({sample.method for sample in each.samples}), each.n_shots))


def p_text(p: float) -> str:
    """'p = .03', 'p < .001', 'p = 1'; 'not tested' where it is not defined."""
    if math.isnan(p):
        return "not tested"
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("0.", ".", 1) if p < 0.995 else "p = 1"


def points(contrast: Contrast) -> str:
    """'2.3 points (0.4 to 4.2; p = .02)': a difference with its interval and corrected p-value."""
    mean, low, high = (percent(value) for value in contrast.difference[:3])
    return f"{mean} points" + ("" if math.isnan(contrast.p) else f" ({low} to {high}; {p_text(contrast.p)})")


def _sentence(rows: pd.DataFrame, found: list[Family], domain: str, rule: str) -> tuple[str, bool]:
    name = next(iter(rows[f"{domain}_set"].dropna()), None)
    oracle = ["checkpoints chosen by an oracle"] if rule in ORACLES else []
    metric = next(iter(rows["metric"].dropna()), "accuracy")
    inside = ", ".join([*([name] if name else []), *([] if metric == "accuracy" else [metric_name(rows["metric"])]), *oracle])
    where = f"{TITLES[domain]}{f' ({inside})' if inside else ''},"
    if not found:
        return f"{where} there is no result.", False
    family = main_family(found)
    teller = _Teller(family, unit(metric))
    text, sure = teller.verdict()
    caution = _caution(rows, family.samples[0], domain, name)
    return f"{where} {text}{caution}", sure and not caution


def _caution(rows: pd.DataFrame, best: Sample, domain: str, set_name: str | None) -> str:
    cell = rows[(rows["method"] == best.method) & (rows["n_shots"] == best.n_shots) & (rows["pattern"] == best.pattern)]
    warnings = [str(each) for text in cell["findings"] for each in tallies(text) if each.set in ("", set_name)]
    return f" The number of {best.method} carries a warning: {'; '.join(warnings)}." if warnings else ""


class _Teller:
    """Says of one family which method is best, or what cannot be told."""

    def __init__(self, family: Family, unit: str):
        self.family, self.unit = family, unit
        self.at = f" at {family.n_shots} shots" if family.n_shots else ""

    def verdict(self) -> tuple[str, bool]:
        best, *others = self.family.samples
        if not others:
            return f"{self.family.name(best)} reaches {self.value(best)}{self.at}; there is nothing to compare it with.", False
        first = self.family.between(best, others[0])
        majority = next((each for each in others if each.method == MAJORITY), None)
        if best.method == MAJORITY:
            nearest = f"the nearest is {self.family.name(others[0])} with {self.value(others[0])}"
            return f"no method beats the majority class ({self.value(best)}){self.at}; {nearest}.", False
        alike = [each for each in others if not self.family.between(best, each).p < ALPHA]
        if not alike:
            closest = max(
                (self.family.between(best, each) for each in others), key=lambda each: (each.p, -each.difference.mean)
            )
            lead = f"{self.family.name(best)} is best{self.at}: {self.value(best)}, ahead of {self.family.name(others[0])} by {points(first)}"
            return f"{lead}.{self.hardest(closest, first)}", True
        above = (
            f"{self.family.name(best)} leads with {self.value(best)}, {self.family.name(others[0])} follows{self.margin(first)}"
        )
        if majority in alike:
            lead = self.family.between(best, majority)
            nearest = "" if others[0] is majority else f"; {self.family.name(others[0])} follows{self.margin(first)}"
            text = f"no method is shown to beat the majority class ({self.value(majority)}){self.at}: {self.family.name(best)} leads with"
            return f"{text} {self.value(best)}, above it by {points(lead)}{nearest}.{self.sight(lead)}", False
        names = [self.family.name(each) for each in (best, *alike)]
        if len(names) > _NAMED:
            names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} others"]
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"one cannot tell which of {listed} is best{self.at}: {above}.{self.sight(first)}", False

    def value(self, sample: Sample) -> str:
        """'61.2 % (58.1 to 64.3)': the mean with its interval over seeds."""
        mean, half = sample.mean, half_width(sample.scores)
        if sample.is_constant:
            return f"{percent(mean)}{self.unit}"
        if math.isnan(half):
            return f"{percent(mean)}{self.unit} in a single trial"
        return f"{percent(mean)}{self.unit} ({percent(max(mean - half, 0.0))} to {percent(min(mean + half, 1.0))})"

    def margin(self, contrast: Contrast) -> str:
        if math.isnan(contrast.p):
            return f" {percent(contrast.difference.mean)} points behind, and a single trial allows no test"
        return f" {points(contrast)} behind"

    def hardest(self, closest: Contrast, first: Contrast) -> str:
        """Where the closest call is not the second: said, since 'best' stands on it."""
        return "" if closest is first else f" The closest call is {self.family.name(closest.b)}, {points(closest)} behind."

    def sight(self, contrast: Contrast) -> str:
        """What so many seeds could have seen."""
        if math.isnan(contrast.detectable) or not contrast.detectable:
            return ""
        return f" With {contrast.difference.n} seeds, a true difference below about {percent(contrast.detectable)} points would be missed."
