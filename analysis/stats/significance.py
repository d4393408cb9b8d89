"""Tests, intervals and power on plain arrays. Nothing here knows frames or methods.

Scores are in [0, 1]; every interval is one of 95 % unless a level is given; a value that is not defined is NaN, which is never
significant. scipy is imported by the functions that use it: importing scipy.stats takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ALPHA = 0.05
_NO_SPREAD = 1e-12  # values that differ by less are the same number
FEWEST = 3
"""Of fewer trials no interval is shown and no test is believed: with two, Student's t is 12.7 standard errors."""


class Difference(NamedTuple):
    """The difference of two means, with its interval and two-sided p-value. `n` is the number of pairs, or the smaller sample.

    `test` tells how: 'paired' (t-test on the differences), 'welch' (no pairs), 'constant' (against a fixed number), '' (too few).
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    test: str

    def __neg__(self) -> Difference:
        return Difference(-self.mean, -self.high, -self.low, self.p, self.n, self.test)


def half_width(values: ArrayLike, level: float = 1 - ALPHA) -> float:
    """Return half the width of the t-interval of the mean; NaN for fewer than two values."""
    from scipy.stats import sem, t

    n = np.size(values)
    return float(t.ppf((1 + level) / 2, n - 1) * sem(values)) if n > 1 else math.nan


def shown_half_width(values: ArrayLike) -> float:
    """Return `half_width` where there is an interval to show: NaN for fewer than `FEWEST` values, and where all are the same."""
    return half_width(values) if np.size(values) >= FEWEST and _has_spread(values) else math.nan


def one_sample(differences: ArrayLike, test: str = "paired") -> Difference:
    """Test whether the mean of `differences` is zero, by the t-test.

    Where all differences are the same number, t is not defined: p is then the exact sign-flip probability, 2^(1 - n) (1 for zero).
    """
    from scipy.stats import ttest_1samp

    values = np.asarray(differences, float)
    n, mean = len(values), float(np.mean(values)) if np.size(values) else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n, "")
    if not _has_spread(values):
        return Difference(mean, mean, mean, 2.0 ** (1 - n) if abs(mean) > _NO_SPREAD else 1.0, n, test)
    result = ttest_1samp(values, 0.0)
    low, high = result.confidence_interval(1 - ALPHA)
    return Difference(mean, float(low), float(high), float(result.pvalue), n, test)


def welch(a: ArrayLike, b: ArrayLike, alternative: str = "two-sided") -> Difference:
    """Estimate mean(a) - mean(b) of independent samples, with Welch's interval and t-test (Welch 1947).

    Args:
        a, b: the samples.
        alternative: of the p-value: that the difference is not zero ('two-sided'), above it ('greater') or below it ('less').

    Returns:
        The difference; the interval is two-sided under every alternative. p is NaN where a sample has fewer than two values, or
        neither has any spread and the means differ: then there is nothing to test with.
    """
    from scipy.stats import ttest_1samp, ttest_ind

    a, b = np.asarray(a, float), np.asarray(b, float)
    n = min(len(a), len(b))
    mean = float(np.mean(a) - np.mean(b)) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n, "")
    if not _has_spread(a) and not _has_spread(b):
        p = math.nan if abs(mean) > _NO_SPREAD else 1.0 if alternative == "two-sided" else 0.5
        return Difference(mean, mean, mean, p, n, "welch")

    def run(alternative: str) -> Any:
        if _has_spread(a) and _has_spread(b):
            return ttest_ind(a, b, equal_var=False, alternative=alternative)
        # a sample without spread adds nothing to the standard error, nor to the degrees of freedom
        return ttest_1samp(a - b.mean() if _has_spread(a) else a.mean() - b, 0.0, alternative=alternative)

    low, high = run("two-sided").confidence_interval(1 - ALPHA)
    return Difference(mean, float(low), float(high), float(run(alternative).pvalue), n, "welch")


def _has_spread(values: ArrayLike) -> bool:
    return bool(np.ptp(values) > _NO_SPREAD)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjust p-values for the number of tests (Holm 1979). NaN stays NaN and counts as no test."""
    p = np.asarray(p_values, float)
    adjusted, tested = np.full(len(p), math.nan), np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def mcnemar(a_right: ArrayLike, b_right: ArrayLike) -> tuple[int, int, float]:
    """Compare two classifiers on the same examples (McNemar 1947).

    Returns:
        How many examples only `a` has right, how many only `b`, and the exact two-sided p-value.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(a_right, bool), np.asarray(b_right, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def minimum_detectable_effect(sd: float, n: int, power: float = 0.8, alpha: float = ALPHA) -> float:
    """Return the smallest true difference that a paired two-sided t-test on `n` differences with deviation `sd` finds with `power`."""
    if n < 2 or not sd > 0:
        return math.nan if n < 2 or math.isnan(sd) else 0.0
    return _standard_effect(n, power, alpha) * sd / math.sqrt(n)


@lru_cache
def _standard_effect(n: int, power: float, alpha: float) -> float:
    """`minimum_detectable_effect` in standard errors."""
    from scipy.optimize import brentq
    from scipy.special import chdtri, ndtr, stdtrit

    # power = mean over the chi-distributed sd of the normal's two tails; scipy's noncentral t is NaN where its tail is tiny
    scale = stdtrit(n - 1, 1 - alpha / 2) * np.sqrt(chdtri(n - 1, (np.arange(4000) + 0.5) / 4000) / (n - 1))

    def lacks(shift: float) -> float:
        return float((ndtr(shift - scale) + ndtr(-shift - scale)).mean()) - power

    return float(brentq(lacks, 0.0, scale.max() + 10.0))


def bootstrap_difference(differences: np.ndarray, n_resamples: int = 2000, seed: int = 0, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Return the interval of the mean of `differences`  # [seeds, examples], over new seeds and new examples at once.

    Rows and columns are drawn with replacement, independently (the pigeonhole bootstrap, Owen 2007, which is conservative: it counts
    the noise of single answers more than once). A percentile interval of few seeds is too short, so the seeds' part of each
    deviation is widened by t(n - 1) / z and by sqrt(n / (n - 1)). One seed: examples alone.
    """
    from scipy.special import ndtri, stdtrit

    table = np.asarray(differences, "float32")
    n_seeds, n_examples = table.shape
    generator, quantile = np.random.default_rng(seed), (1 + level) / 2
    wider = stdtrit(n_seeds - 1, quantile) / ndtri(quantile) * math.sqrt(n_seeds / (n_seeds - 1)) if n_seeds > 1 else 0.0
    seeds = generator.multinomial(n_seeds, [1 / n_seeds] * n_seeds, n_resamples)  # [resamples, seeds]
    weights = (1 + wider * (seeds - 1)) / n_seeds
    draws = _example_draws(n_examples, n_resamples, seed)
    of_seeds = [table @ draws[start : start + 256].T.astype("float32") for start in range(0, n_resamples, 256)]
    means = (weights * np.concatenate(of_seeds, 1).T).sum(1) / n_examples
    low, high = np.quantile(means, [1 - quantile, quantile])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _example_draws(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each of `n` examples is in each resample  # [resamples, n]; the same for every pair of methods, so drawn once."""
    generator = np.random.default_rng([seed, n])
    rows = (np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(n_resamples))
    return np.stack([row.astype("uint8") for row in rows])


def indistinct_groups(names: Sequence[str], p_values: Mapping[tuple[str, str], float], alpha: float = ALPHA) -> list[list[str]]:
    """Find the largest groups of names of which no two differ significantly, in the order of `names`.

    Args:
        names: best first.
        p_values: (name, other) -> adjusted p, for every pair in either order; NaN (no test) does not tell two apart.
    """
    alike = {name: {name} for name in names}
    for a, b in combinations(names, 2):
        if not p_values.get((a, b), p_values.get((b, a), math.nan)) < alpha:
            alike[a].add(b)
            alike[b].add(a)
    cliques = [sorted(clique, key=names.index) for clique in _cliques(set(), set(names), set(), alike)]
    return sorted(cliques, key=lambda group: [names.index(name) for name in group])


def _cliques(chosen: set, open_: set, closed: set, alike: Mapping[str, set]) -> Iterator[set]:
    """Find the largest cliques (Bron and Kerbosch 1973), with the pivot of Tomita et al. 2006, which leaves few branches."""
    if not open_ and not closed:
        yield chosen
        return
    pivot = max(sorted(open_ | closed), key=lambda name: len(open_ & alike[name]))
    for name in sorted(open_ - (alike[pivot] - {pivot})):
        near = alike[name] - {name}
        yield from _cliques(chosen | {name}, open_ & near, closed & near, alike)
        open_, closed = open_ - {name}, closed | {name}


def expected_best(scores: ArrayLike) -> np.ndarray:
    """Return the expected best of n = 1..N trials drawn from these N, with replacement (Dodge et al. 2019, eq. 4)."""
    ordered = np.sort(np.asarray(scores, float))
    n = len(ordered)
    ranks = np.arange(n + 1) / n
    return np.array([(np.diff(ranks**budget) * ordered).sum() for budget in range(1, n + 1)])


def variance_components(scores: ArrayLike, factors: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Attribute the variance of `scores` to each factor (a kind of seed) and to the rest ('residual').

    Half the squared difference of two trials has as its expectation the residual variance plus those of the factors in which the
    two differ; the components are the non-negative least-squares solution over all pairs, averaged by what they differ in.
    Factors that always vary together cannot be told apart and are one component, joined by '+'. For a balanced design this is the
    estimate of the analysis of variance with random effects.
    """
    from scipy.optimize import nnls

    y = np.asarray(scores, float)
    codes = {name: np.unique(np.asarray(values), return_inverse=True)[1] for name, values in factors.items()}
    first, second = np.triu_indices(len(y), 1)
    patterns: dict[bytes, list[str]] = {}
    for name, code in codes.items():
        if (differs := code[first] != code[second]).any():
            patterns.setdefault(differs.tobytes(), []).append(name)
    names = ["+".join(group) for group in patterns.values()]
    if not names:
        return {"residual": float(np.var(y, ddof=1)) if len(y) > 1 else math.nan}
    columns = np.array([np.frombuffer(pattern, bool) for pattern in patterns]).T  # [pairs, components]
    kinds, which = np.unique(columns, axis=0, return_inverse=True)
    counts = np.bincount(which.ravel())
    targets = np.bincount(which.ravel(), 0.5 * (y[first] - y[second]) ** 2) / counts
    # where every pair differs in everything, the residual cannot be told from the seeds: it is theirs
    always = len(kinds) == 1
    design = kinds.astype(float) if always else np.column_stack([kinds, np.ones(len(kinds))])
    weights = np.sqrt(counts)
    solution, _ = nnls(design * weights[:, None], targets * weights)
    return dict(zip([*names, *([] if always else ["residual"])], map(float, solution), strict=True)) | ({"residual": 0.0} if always else {})
