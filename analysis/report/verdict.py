"""The answer in one sentence for each model and task and domain, no surer than the paired comparisons allow."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.stats import FEWEST, MAJORITY, Contrast, Family, Sample, families, shown_half_width
from analysis.tables import TITLES, compare, metric_name, p_text, percent, span, tallies, unit
from llmft.config import ORACLES
from llmft.records import Manifest

if TYPE_CHECKING:
    import pandas as pd


_NAMED = 6  # of more methods that cannot be told apart only the first are named; the ranking has all


@dataclass(frozen=True)
class Verdict:
    """Which method is best for one model and task. `sure` tells for each sentence whether the comparisons allow one to say so.

    `unfinished` says how much of the plan has no result yet, and is empty where all of it has; before that nothing is sure.
    """

    model: str
    task: str
    in_domain: str
    out_of_domain: str
    in_domain_sure: bool
    out_of_domain_sure: bool
    unfinished: str = ""


def write_verdicts(frame: pd.DataFrame, rule: str = "best_dev", manifest: Manifest | None = None) -> list[Verdict]:
    """The best method of each model and task by mean score, in and out of domain.

    Methods are compared at the number of shots that most of them were tried with (the largest of those, if several); zero-shot
    prompting and the majority class always stand beside them. A method is called best only if it is significantly better than every
    other: differences paired by seed, t-test, p corrected for all pairs (`analysis.stats.comparisons`). Otherwise the sentence names those
    that one cannot tell from the best. Warnings on the best number are said with it, and nothing is sure that carries one.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.RULES`).
        manifest: from `analysis.read_manifest`; without it nothing is known of what is still to come.

    Raises:
        UserError: there is no such rule.
    """
    found = families(frame, rule)
    return verdict_of(compare(frame, rule, found), found, rule, manifest, set(frame["digest"]))


def verdict_of(
    comparison: pd.DataFrame, found: list[Family], rule: str, manifest: Manifest | None = None, recorded: Collection[str] = ()
) -> list[Verdict]:
    """`headline`, from `analysis.compare` and `analysis.families`; `recorded` are the digests of the trials with a record."""
    answers = []
    planned = [(each.cell.get("model"), each.cell.get("task")) for each in manifest.cells] if manifest else []
    for model, task in dict.fromkeys([*comparison[["model", "task"]].itertuples(index=False, name=None), *planned]):
        rows = comparison[(comparison["model"] == model) & (comparison["task"] == task)]
        unfinished = manifest.unfinished(model, task, recorded) if manifest else ""
        here = [family for family in found if (family.model, family.task) == (model, task)]
        sentences = [_sentence(rows, [each for each in here if each.domain == domain], domain, rule) for domain in TITLES]
        (inside, sure_inside), (outside, sure_outside) = [(text, sure and not unfinished) for text, sure in sentences]
        answers.append(Verdict(model, task, inside, outside, sure_inside, sure_outside, unfinished))
    return answers


def verdict_lines(answers: Sequence[Verdict]) -> Iterator[str]:
    """The answers for a terminal, a sentence a line; each names its model and task where there are several."""
    for each in answers:
        where = f"{each.model} on {each.task}: " if len(answers) > 1 else ""
        for text in filter(None, (each.unfinished, each.in_domain, each.out_of_domain)):
            yield f"{where}{text[0].lower()}{text[1:]}" if where else text


def main_family(found: list[Family]) -> Family:
    """The family that the answer speaks of: the one with the most methods, and of those the one with the most shots."""
    return max(found, key=lambda each: (len({sample.method for sample in each.samples}), each.n_shots))


def in_points(contrast: Contrast) -> str:
    """'2.3 points (0.4 to 4.2; p = .02)': a difference with its interval and corrected p-value, or why there is none."""
    why = why_untested(contrast) or f"{span(contrast.difference) or 'the same with every seed'}; {p_text(contrast.p)}"
    return f"{percent(contrast.difference.mean)} points ({why})"


def why_untested(contrast: Contrast) -> str:
    """Why a comparison tells nothing; empty where it does."""
    if contrast.told:
        return ""
    n = contrast.difference.n
    return "a single trial allows no test" if n < 2 else f"{n} seeds are too few to tell" if n < FEWEST else "no spread, so no test"


def _sentence(rows: pd.DataFrame, found: list[Family], domain: str, rule: str) -> tuple[str, bool]:
    name = next(iter(rows[f"{domain}_set"].dropna()), None)
    oracle = ["checkpoints chosen by an oracle"] if rule in ORACLES else []
    metric = next(iter(rows["metric"].dropna()), "accuracy")
    inside = ", ".join([*([name] if name else []), *([] if metric == "accuracy" else [metric_name(rows["metric"])]), *oracle])
    where = f"{TITLES[domain]}{f' ({inside})' if inside else ''},"
    if not found:
        return f"{where} there is no result.", False
    family = main_family(found)
    teller = VerdictWriter(family, unit(metric))
    text, sure = teller.verdict()
    caution = _caution(rows, family.samples[0], domain, name)
    return f"{where} {text}{caution}{_elsewhere(family, found, unit(metric))}", sure and not caution


def _elsewhere(family: Family, found: list[Family], unit: str) -> str:
    """The best mean at another number of shots, where it is higher than all that `family` speaks of."""
    other = max(found, key=lambda each: each.samples[0].mean)
    best = other.samples[0]
    if best.mean <= family.samples[0].mean:
        return ""
    return f" The highest mean at any number of shots: {other.name(best)} with {best.n_shots}, {VerdictWriter(other, unit).value(best)}."


def _caution(rows: pd.DataFrame, best: Sample, domain: str, set_name: str | None) -> str:
    cell = rows[(rows["method"] == best.method) & (rows["n_shots"] == best.n_shots) & (rows["pattern"] == best.pattern)]
    warnings = [str(each) for text in cell["findings"] for each in tallies(text) if each.set in ("", set_name)]
    return f" The number of {best.method} carries a warning: {'; '.join(warnings)}." if warnings else ""


class VerdictWriter:
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
        alike = [each for each in others if not self.family.between(best, each).significant]
        if not alike:
            closest = max((self.family.between(best, each) for each in others), key=lambda each: (each.p, -each.difference.mean))
            lead = f"{self.family.name(best)} is best{self.at}: {self.value(best)}, ahead of {self.family.name(others[0])} by {in_points(first)}"
            return f"{lead}.{self.hardest(closest, first)}", True
        above = f"{self.family.name(best)} leads with {self.value(best)}, {self.family.name(others[0])} follows{self.margin(first)}"
        if majority in alike:
            lead = self.family.between(best, majority)
            nearest = "" if others[0] is majority else f"; {self.family.name(others[0])} follows{self.margin(first)}"
            text = f"no method is shown to beat the majority class ({self.value(majority)}){self.at}: {self.family.name(best)} leads with"
            return f"{text} {self.value(best)}, above it by {in_points(lead)}{nearest}.{self.sight(lead)}", False
        names = [self.family.name(each) for each in (best, *alike)]
        if len(names) > _NAMED:
            names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} others"]
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"one cannot tell which of {listed} is best{self.at}: {above}.{self.sight(first)}", False

    def value(self, sample: Sample) -> str:
        """'61.2 % (58.1 to 64.3)': the mean with its interval over seeds, or over how many trials it is where there is none."""
        mean, half, n = sample.mean, shown_half_width(sample.scores), len(sample.scores)
        if sample.is_constant:
            return f"{percent(mean)}{self.unit}"
        if math.isnan(half):
            trials = "in a single trial" if n == 1 else f"over {n} trials" if n < FEWEST else f"in each of {n} trials"
            return f"{percent(mean)}{self.unit} {trials}"
        return f"{percent(mean)}{self.unit} ({percent(max(mean - half, 0.0))} to {percent(min(mean + half, 1.0))})"

    def margin(self, contrast: Contrast) -> str:
        if why := why_untested(contrast):
            return f" {percent(contrast.difference.mean)} points behind, and {why}"
        return f" {in_points(contrast)} behind"

    def hardest(self, closest: Contrast, first: Contrast) -> str:
        """Where the closest call is not the second: said, since 'best' stands on it."""
        return "" if closest is first else f" The closest call is {self.family.name(closest.b)}, {in_points(closest)} behind."

    def sight(self, contrast: Contrast) -> str:
        """What so many seeds could have seen."""
        if not contrast.told or math.isnan(contrast.detectable) or not contrast.detectable:
            return ""
        return f" With {contrast.difference.n} seeds, a true difference below about {percent(contrast.detectable)} points would be missed."
