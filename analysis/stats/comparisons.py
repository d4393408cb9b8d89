"""Compare methods in pairs: differences by seed, their tests, and the correction over a family of comparisons.

Methods of one model and task are compared at the same number of shots; zero-shot prompting and the majority class stand beside
them. The same data seed draws the same examples for every method, so differences are taken seed by seed and tested by the paired
t-test; trials that differ in other seeds alone are paired by those. A method without seeds (zero-shot prompting, the majority
class) is a constant; runs that share no seeds (published ones) are compared by Welch's test. p-values are corrected for all
comparisons of one model, task, number of shots and domain (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.frames import DOMAINS, group_by, select
from analysis.stats.model_sizes import by_model
from analysis.stats.significance import (
    ALPHA,
    FEWEST,
    Difference,
    holm,
    indistinct_groups,
    minimum_detectable_effect,
    one_sample,
    welch,
)
from llmft.seeds import SEED_FIELDS

if TYPE_CHECKING:
    import pandas as pd


MAJORITY = "majority_class"


@dataclass(frozen=True)
class Sample:
    """The scores of one method under one pattern: by seed, or in a list where the trials name no seed."""

    method: str
    pattern: str
    n_shots: int
    scores: tuple[float, ...]
    seeds: tuple[int, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether no seed changes the score: nothing is drawn."""
        return self.n_shots == 0 and len(self.scores) == 1

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


class Contrast(NamedTuple):
    """`a` minus `b`; `p` is corrected over its family, `n_family` the number of comparisons there."""

    a: Sample
    b: Sample
    difference: Difference
    p: float
    n_family: int

    @property
    def testable(self) -> bool:
        """Whether there is a test, with at least `FEWEST` trials."""
        return self.difference.n >= FEWEST and not math.isnan(self.p)

    @property
    def significant(self) -> bool:
        return self.testable and self.p < ALPHA

    @property
    def detectable(self) -> float:
        """The smallest true difference that this comparison finds with a power of 80 %, without the correction; NaN for Welch's test."""
        half, n = (self.difference.high - self.difference.low) / 2, self.difference.n
        if self.difference.test not in ("paired", "constant") or n < 2:
            return math.nan
        from scipy.stats import t

        return minimum_detectable_effect(half / float(t.ppf(1 - ALPHA / 2, n - 1)) * math.sqrt(n), n)


@dataclass(frozen=True)
class Family:
    """All methods of one model and task at one number of shots, best mean first, and every pair of them."""

    model: str
    task: str
    n_shots: int
    domain: str
    samples: list[Sample]
    contrasts: list[Contrast]

    def name(self, sample: Sample) -> str:
        """Name a method, with its pattern where it was tried with several."""
        if sample.method == MAJORITY:
            return "the majority class"
        several = sum(other.method == sample.method for other in self.samples) > 1
        return f"{sample.method} ({sample.pattern})" if several else sample.method

    def between(self, a: Sample, b: Sample) -> Contrast:
        """Return the comparison of two samples; `a` is the one with the better mean."""
        return next(contrast for contrast in self.contrasts if contrast.a is a and contrast.b is b)

    def beaten(self, sample: Sample) -> bool:
        """Whether some other method is significantly better."""
        return any(contrast.b is sample and contrast.significant for contrast in self.contrasts)

    @property
    def groups(self) -> list[list[Sample]]:
        """The largest sets of samples of which no two can be told apart."""
        by_name = {str(position): sample for position, sample in enumerate(self.samples)}
        names = {id(sample): name for name, sample in by_name.items()}
        p_values = {
            (names[id(contrast.a)], names[id(contrast.b)]): contrast.p if contrast.testable else math.nan for contrast in self.contrasts
        }
        return [[by_name[name] for name in group] for group in indistinct_groups(list(by_name), p_values)]


def build_families(frame: pd.DataFrame, rule: str = "best_dev") -> list[Family]:
    """Build every family of comparisons: model (by size) x task x number of shots x domain.

    Raises:
        UserError: there is no such rule.
    """
    chosen = select(frame, rule)
    done = chosen[chosen["status"] == "finished"]
    families = []
    for (model, task), trials in by_model(done, "task"):
        for domain in DOMAINS:
            scored = trials[trials[f"{domain}_score"].notna()]
            samples = list(_samples(scored, domain))
            baselines = [sample for sample in samples if sample.n_shots == 0]
            for n_shots in sorted({sample.n_shots for sample in samples if sample.n_shots}) or [0]:
                at_shots = [sample for sample in samples if sample.n_shots == n_shots and n_shots] + baselines
                if [sample for sample in at_shots if sample.method != MAJORITY]:
                    families.append(_build_family(model, task, n_shots, domain, at_shots))
    return families


def contrast_table(frame: pd.DataFrame, rule: str = "best_dev", families: list[Family] | None = None) -> pd.DataFrame:
    """List every pair of methods: the better mean in `a`; difference, 95 % interval, p, corrected p, pairs, test.

    Args:
        frame: from `analysis.load`.
        rule: which checkpoint counts (`analysis.frames.selection.RULES`).
        families: `build_families(frame, rule)`, where the caller has them already.

    Returns:
        model, task, n_shots, domain, a, a_pattern, b, b_pattern, difference, low, high, p, p_holm, n, test ('paired', 'welch',
        'constant', '' where there are too few trials to test), detectable, rule.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    names = ["model", "task", "n_shots", "domain", "a", "a_pattern", "b", "b_pattern", "difference", "low", "high", "p", "p_holm"]
    rows = [
        (
            family.model, family.task, family.n_shots, family.domain, a.method, a.pattern, b.method, b.pattern,
            difference.mean, difference.low, difference.high, difference.p, contrast.p, difference.n, difference.test, contrast.detectable,
        )
        for family in (build_families(frame, rule) if families is None else families)
        for contrast in family.contrasts
        for a, b, difference in [contrast[:3]]
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*names, "n", "test", "detectable"]).assign(rule=rule)


def estimate_difference(a: Sample, b: Sample) -> Difference:
    """Estimate mean(a) - mean(b), with the strongest test that the two samples allow."""
    if a.is_constant and b.is_constant:
        return Difference(a.mean - b.mean, math.nan, math.nan, math.nan, 1, "")
    if b.is_constant:
        return one_sample(np.subtract(a.scores, b.mean), "constant")
    if a.is_constant:
        return -one_sample(np.subtract(b.scores, a.mean), "constant")
    of_a, of_b = dict(zip(a.seeds, a.scores, strict=False)), dict(zip(b.seeds, b.scores, strict=False))
    shared = sorted(of_a.keys() & of_b.keys())
    if shared:
        return one_sample([of_a[seed] - of_b[seed] for seed in shared])
    return welch(a.scores, b.scores)


def pairing_seed(trials: pd.DataFrame) -> str:
    """Return the column whose seeds pair the trials: the data seed where it varies, else the first seed that does."""
    return next((name for name in SEED_FIELDS if trials[name].nunique() > 1), SEED_FIELDS[0])


def _samples(trials: pd.DataFrame, domain: str) -> Iterator[Sample]:
    varied = pairing_seed(trials)
    for (n_shots, method, pattern), cell in group_by(trials, ["n_shots", "method", "pattern"]):
        seeds, scores = cell[varied], cell[f"{domain}_score"]
        if seeds.notna().all():
            by_seed = scores.groupby(seeds).mean()
            yield Sample(method, pattern, int(n_shots), tuple(by_seed), tuple(map(int, by_seed.index)))
        else:
            yield Sample(method, pattern, int(n_shots), tuple(scores))
    share = trials.loc[trials["metric"] == "accuracy", f"{domain}_majority"].mean()
    if not math.isnan(share):
        yield Sample(MAJORITY, "", 0, (float(share),))


def _build_family(model: str, task: str, n_shots: int, domain: str, samples: list[Sample]) -> Family:
    ranked = sorted(samples, key=lambda sample: (-sample.mean, sample.method == MAJORITY))
    pairs = list(combinations(ranked, 2))
    differences = [estimate_difference(a, b) for a, b in pairs]
    adjusted = holm([difference.p for difference in differences])
    n_family = sum(not math.isnan(p) for p in adjusted)
    contrasts = [Contrast(*pair, difference, float(p), n_family) for pair, difference, p in zip(pairs, differences, adjusted, strict=True)]
    return Family(model, task, n_shots, domain, ranked, contrasts)
