"""Write the verdict: a sentence for each model, task and domain, no surer than the comparisons allow.

What the comparisons show is computed by `analysis.stats.decision`; here it is put into words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.stats import FEWEST, Contrast, Decision, Family, Sample, build_families, decide, main_family, shown_half_width
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
    """Say which method is best for each model and task, in and out of domain.

    Methods are compared at the number of shots that most of them were tried with (the largest of those, if several); zero-shot
    prompting and the majority class always stand beside them. A method is called best only if it is significantly better than every
    other: differences paired by seed, t-test, p corrected for all pairs (`analysis.stats.comparisons`). Otherwise the sentence names
    those that one cannot tell from the best. Warnings on the best number are said with it, and nothing is sure that carries one.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`).
        manifest: from `analysis.read_manifest`; without it nothing is known of what is still to come.

    Raises:
        UserError: there is no such rule.
    """
    families = build_families(frame, rule)
    return verdicts_of(compare(frame, rule, families), families, rule, manifest, set(frame["digest"]))


def verdicts_of(
    comparison: pd.DataFrame, families: list[Family], rule: str, manifest: Manifest | None = None, recorded: Collection[str] = ()
) -> list[Verdict]:
    """Write verdicts from `analysis.compare` and `analysis.stats.build_families`; `recorded`: digests of the trials with a record."""
    verdicts = []
    planned = [(cell.cell.get("model"), cell.cell.get("task")) for cell in manifest.cells] if manifest else []
    for model, task in dict.fromkeys([*comparison[["model", "task"]].itertuples(index=False, name=None), *planned]):
        rows = comparison[(comparison["model"] == model) & (comparison["task"] == task)]
        unfinished = manifest.unfinished(model, task, recorded) if manifest else ""
        of_task = [family for family in families if (family.model, family.task) == (model, task)]
        sentences = [_sentence(rows, [family for family in of_task if family.domain == domain], domain, rule) for domain in TITLES]
        (inside, sure_inside), (outside, sure_outside) = [(text, sure and not unfinished) for text, sure in sentences]
        verdicts.append(Verdict(model, task, inside, outside, sure_inside, sure_outside, unfinished))
    return verdicts


def verdict_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield the verdicts for a terminal, a sentence a line, with model and task where there are several."""
    for verdict in verdicts:
        where = f"{verdict.model} on {verdict.task}: " if len(verdicts) > 1 else ""
        for text in filter(None, (verdict.unfinished, verdict.in_domain, verdict.out_of_domain)):
            yield f"{where}{text[0].lower()}{text[1:]}" if where else text


def in_points(contrast: Contrast) -> str:
    """Format a difference with its interval and corrected p-value, or why there is none: '2.3 points (0.4 to 4.2; p = .02)'."""
    why = why_untested(contrast) or f"{span(contrast.difference) or 'the same with every seed'}; {p_text(contrast.p)}"
    return f"{percent(contrast.difference.mean)} points ({why})"


def why_untested(contrast: Contrast) -> str:
    """Say why a comparison has no test to believe; empty where it has one."""
    if contrast.testable:
        return ""
    n = contrast.difference.n
    return "a single trial allows no test" if n < 2 else f"{n} seeds are too few to tell" if n < FEWEST else "no spread, so no test"


def _sentence(rows: pd.DataFrame, families: list[Family], domain: str, rule: str) -> tuple[str, bool]:
    name = next(iter(rows[f"{domain}_set"].dropna()), None)
    oracle = ["checkpoints chosen by an oracle"] if rule in ORACLES else []
    metric = next(iter(rows["metric"].dropna()), "accuracy")
    inside = ", ".join([*([name] if name else []), *([] if metric == "accuracy" else [metric_name(rows["metric"])]), *oracle])
    where = f"{TITLES[domain]}{f' ({inside})' if inside else ''},"
    if not families:
        return f"{where} there is no result.", False
    family = main_family(families)
    decision = decide(family)
    text = VerdictWriter(family, unit(metric)).sentence(decision)
    caution = _caution(rows, family.samples[0], domain, name)
    return f"{where} {text}{caution}{_elsewhere(family, families, unit(metric))}", decision.kind == "best" and not caution


def _elsewhere(family: Family, families: list[Family], unit: str) -> str:
    """Name the best mean at another number of shots, where it is higher than all that `family` speaks of."""
    other = max(families, key=lambda family: family.samples[0].mean)
    best = other.samples[0]
    if best.mean <= family.samples[0].mean:
        return ""
    return f" The highest mean at any number of shots: {other.name(best)} with {best.n_shots}, {VerdictWriter(other, unit).value(best)}."


def _caution(rows: pd.DataFrame, best: Sample, domain: str, set_name: str | None) -> str:
    cell = rows[(rows["method"] == best.method) & (rows["n_shots"] == best.n_shots) & (rows["pattern"] == best.pattern)]
    warnings = [str(tally) for text in cell["findings"] for tally in tallies(text) if tally.set in ("", set_name)]
    return f" The number of {best.method} carries a warning: {'; '.join(warnings)}." if warnings else ""


class VerdictWriter:
    """Puts the decision on one family into a sentence; `unit` stands behind its scores."""

    def __init__(self, family: Family, unit: str):
        self.family, self.unit = family, unit
        self.at = f" at {family.n_shots} shots" if family.n_shots else ""

    def sentence(self, decision: Decision) -> str:
        best, runner_up = decision.best, decision.runner_up
        if runner_up is None:
            return f"{self.named(best)} reaches {self.value(best)}{self.at}; there is nothing to compare it with."
        if decision.kind == "below_majority":
            nearest = f"the nearest is {self.named(runner_up.b)} with {self.value(runner_up.b)}"
            return f"no method beats the majority class ({self.value(best)}){self.at}; {nearest}."
        if decision.kind == "best":
            lead = f"ahead of {self.named(runner_up.b)} by {in_points(runner_up)}"
            return f"{self.named(best)} is best{self.at}: {self.value(best)}, {lead}.{self.closest_call_text(decision)}"
        if decision.kind == "majority_not_beaten" and decision.with_majority:
            return self.majority_text(decision, decision.with_majority)
        above = f"{self.named(best)} leads with {self.value(best)}, {self.named(runner_up.b)} follows{self.margin(runner_up)}"
        listed = self.listed([best, *decision.indistinct])
        return f"one cannot tell which of {listed} is best{self.at}: {above}.{self.detectable_text(runner_up)}"

    def majority_text(self, decision: Decision, contrast: Contrast) -> str:
        """Say that the best method is not shown to beat the majority class (`contrast`), and which method follows."""
        best, runner_up, majority = decision.best, decision.runner_up, contrast.b
        follows = ""
        if runner_up and runner_up is not contrast:
            follows = f"; {self.named(runner_up.b)} follows{self.margin(runner_up)}"
        text = f"no method is shown to beat the majority class ({self.value(majority)}){self.at}: {self.named(best)} leads with"
        return f"{text} {self.value(best)}, above it by {in_points(contrast)}{follows}.{self.detectable_text(contrast)}"

    def listed(self, samples: Sequence[Sample]) -> str:
        """List names: 'a, b and c', of more than `_NAMED` only the first."""
        names = [self.named(sample) for sample in samples]
        if len(names) > _NAMED:
            names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} others"]
        return f"{', '.join(names[:-1])} and {names[-1]}"

    def named(self, sample: Sample) -> str:
        return self.family.name(sample)

    def value(self, sample: Sample) -> str:
        """Format the mean with its interval over seeds, or the number of trials where there is none: '61.2 % (58.1 to 64.3)'."""
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

    def closest_call_text(self, decision: Decision) -> str:
        """Name the comparison with the largest p-value where it is not that with the second mean, since 'best' depends on it."""
        closest = decision.closest
        if closest is None or closest is decision.runner_up:
            return ""
        return f" The closest call is {self.named(closest.b)}, {in_points(closest)} behind."

    def detectable_text(self, contrast: Contrast) -> str:
        """Say which true difference so many seeds could have shown."""
        if not contrast.testable or math.isnan(contrast.detectable) or not contrast.detectable:
            return ""
        return f" With {contrast.difference.n} seeds, a true difference below about {percent(contrast.detectable)} points would be missed."
