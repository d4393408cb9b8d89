"""Tests, intervals and what a comparison could have seen, on plain arrays. Nothing here knows frames or methods.

Scores are in [0, 1]; every interval is one of 95 % unless a level is given; a value that is not defined is NaN, which is never
significant. scipy.special does the distributions, and is imported where it is used (scipy.stats would take a second or more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
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


def half_width(values: np.ndarray, level: float = 1 - ALPHA) -> float:
    """Half the width of the t-interval of the mean; NaN for fewer than two values."""
    from scipy.special import stdtrit

    n = len(values)
    return float(stdtrit(n - 1, (1 + level) / 2) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def shown_half_width(values: np.ndarray) -> float:
    """`half_width` where there is an interval to show: NaN for fewer than `FEWEST` values, and where all are the same."""
    return half_width(values) if len(values) >= FEWEST and np.ptp(values) > 1e-12 else math.nan


def one_sample(differences: Sequence[float], test: str = "paired") -> Difference:
    """Whether the mean of `differences` is zero, by the t-test.

    Where all differences are the same number, t is not defined: p is then the exact sign-flip probability, 2^(1 - n) (1 for zero).
    """
    from scipy.special import stdtr

    values = np.asarray(differences, float)
    n = len(values)
    if n < 2:
        return Difference(float(values.mean()) if n else math.nan, math.nan, math.nan, math.nan, n, "")
    mean, half = float(values.mean()), half_width(values)
    if np.ptp(values) < 1e-12:
        return Difference(mean, mean, mean, 2.0 ** (1 - n) if abs(mean) > 1e-12 else 1.0, n, test)
    t = mean / (np.std(values, ddof=1) / math.sqrt(n))
    return Difference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(t))), n, test)


def welch_p(a: Sequence[float], b: Sequence[float], alternative: str = "two-sided") -> float:
    """p-value of Welch's t-test that the mean of `a` is other than ('two-sided'), above ('greater') or below ('less') that of `b`.

    NaN where a sample has fewer than two values, or neither has any spread and the means differ: then there is nothing to test with.
    """
    from scipy.special import stdtr

    shift, error, freedom = _welch(a, b)
    if error == 0.0 and abs(shift) < 1e-12:
        return 1.0 if alternative == "two-sided" else 0.5
    if not error > 0:
        return math.nan
    t = shift / error
    return float({"two-sided": 2 * stdtr(freedom, -abs(t)), "greater": stdtr(freedom, -t), "less": stdtr(freedom, t)}[alternative])


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """mean(a) - mean(b) of independent samples, with Welch's interval and two-sided test."""
    from scipy.special import stdtrit

    shift, error, freedom = _welch(a, b)
    n = min(len(a), len(b))
    if n < 2:
        return Difference(shift, math.nan, math.nan, math.nan, n, "")
    half = float(stdtrit(freedom, 1 - ALPHA / 2)) * error if error > 0 else 0.0
    return Difference(shift, shift - half, shift + half, welch_p(a, b), n, "welch")


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means, its standard error and the degrees of freedom (Welch 1947, Satterthwaite 1946)."""
    if not len(a) or not len(b):
        return math.nan, math.nan, math.nan
    shift = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return shift, math.nan, math.nan
    parts = [0.0 if np.ptp(each) < 1e-12 else np.var(each, ddof=1) / len(each) for each in (a, b)]
    if sum(parts) == 0:
        return shift, 0.0, math.nan
    freedom = sum(parts) ** 2 / sum(part**2 / (len(each) - 1) for part, each in zip(parts, (a, b), strict=True))
    return shift, math.sqrt(sum(parts)), float(freedom)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests (Holm 1979). NaN stays NaN and counts as no test."""
    p = np.asarray(p_values, float)
    adjusted, tested = np.full(len(p), math.nan), np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def mcnemar(a_right: Sequence[bool], b_right: Sequence[bool]) -> tuple[int, int, float]:
    """Two classifiers on the same examples: how many only `a` has right, how many only `b`, and the exact two-sided p-value."""
    from scipy.special import bdtr

    a, b = np.asarray(a_right, bool), np.asarray(b_right, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def minimum_detectable_effect(sd: float, n: int, power: float = 0.8, alpha: float = ALPHA) -> float:
    """The smallest true difference that a paired two-sided t-test on `n` differences of spread `sd` would find with this power."""
    if n < 2 or not sd > 0:
        return math.nan if n < 2 or math.isnan(sd) else 0.0
    return _standard_effect(n, power, alpha) * sd / math.sqrt(n)


@lru_cache
def _standard_effect(n: int, power: float, alpha: float) -> float:
    """The same in standard errors."""
    from scipy.optimize import brentq
    from scipy.special import chdtri, ndtr, stdtrit

    # power = mean over the chi-distributed sd of the normal's two tails; scipy's noncentral t is NaN where its tail is tiny
    scale = stdtrit(n - 1, 1 - alpha / 2) * np.sqrt(chdtri(n - 1, (np.arange(4000) + 0.5) / 4000) / (n - 1))

    def lacks(shift: float) -> float:
        return float((ndtr(shift - scale) + ndtr(-shift - scale)).mean()) - power

    return float(brentq(lacks, 0.0, scale.max() + 10.0))


def bootstrap_difference(differences: np.ndarray, n_resamples: int = 2000, seed: int = 0, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Interval of the mean of `differences`  # [seeds, examples], over new seeds and new examples at once.

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
    """The largest groups of names of which no two differ significantly, in the order of `names`.

    Args:
        names: best first.
        p_values: (name, other) -> adjusted p, for every pair in either order; NaN (no test) does not tell two apart.
    """
    alike = {name: {name} for name in names}
    for a, b in combinations(names, 2):
        if not p_values.get((a, b), p_values.get((b, a), math.nan)) < alpha:
            alike[a].add(b), alike[b].add(a)
    cliques = [sorted(each, key=names.index) for each in _cliques(set(), set(names), set(), alike)]
    return sorted(cliques, key=lambda group: [names.index(name) for name in group])


def _cliques(chosen: set, open_: set, closed: set, alike: Mapping[str, set]) -> Iterator[set]:
    """Bron and Kerbosch 1973, with the pivot of Tomita et al. 2006: where most are alike, few branches are left."""
    if not open_ and not closed:
        yield chosen
        return
    pivot = max(sorted(open_ | closed), key=lambda name: len(open_ & alike[name]))
    for name in sorted(open_ - (alike[pivot] - {pivot})):
        near = alike[name] - {name}
        yield from _cliques(chosen | {name}, open_ & near, closed & near, alike)
        open_, closed = open_ - {name}, closed | {name}


def expected_best(scores: Sequence[float]) -> np.ndarray:
    """Expected best of n = 1..N trials drawn from these N, with replacement (Dodge et al. 2019, eq. 4)."""
    ordered = np.sort(np.asarray(scores, float))
    n = len(ordered)
    ranks = np.arange(n + 1) / n
    return np.array([(np.diff(ranks**budget) * ordered).sum() for budget in range(1, n + 1)])


def variance_components(scores: Sequence[float], factors: Mapping[str, Sequence]) -> dict[str, float]:
    """Variance of `scores` attributed to each factor (a kind of seed) and to the rest ('residual').

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
