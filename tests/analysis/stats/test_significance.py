"""The statistics against scipy, statsmodels and brute force, and the coverage of the intervals by simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from analysis.stats import significance as stats

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_paired_and_welch_agree_with_scipy(seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(0.6, 0.05, 6), random.normal(0.62, 0.02, 6 + seed % 3)
    paired, expected = stats.one_sample(a - b[:6]), scipy.stats.ttest_rel(a, b[:6])
    assert paired.p == pytest.approx(expected.pvalue)
    assert (paired.low, paired.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    independent, expected = stats.welch(a, b), scipy.stats.ttest_ind(a, b, equal_var=False)
    assert independent.p == pytest.approx(expected.pvalue) and independent.mean == pytest.approx(a.mean() - b.mean())
    assert (independent.low, independent.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    for side in ("greater", "less", "two-sided"):
        assert stats.welch(a, b, side).p == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False, alternative=side).pvalue)


def test_a_sample_without_spread_has_a_test_only_against_one_that_has():
    constant, other = [0.5] * 10, [0.5, 0.52, 0.49, 0.55]
    assert stats.welch(constant, other).p == pytest.approx(scipy.stats.ttest_ind(other, [0.5], axis=0, equal_var=True).pvalue, abs=1)
    assert stats.welch(constant, other).p == pytest.approx(scipy.stats.ttest_1samp(other, 0.5).pvalue)
    assert stats.welch(constant, constant).p == 1.0 and stats.welch(constant, constant, "greater").p == 0.5
    assert math.isnan(stats.welch(constant, [0.6] * 10).p) and math.isnan(stats.welch([0.5], other).p)


def test_equal_differences_fall_back_to_the_sign_flip_probability():
    found = stats.one_sample([0.02] * 5)
    flips = [sum(signs) for signs in product((-0.02, 0.02), repeat=5)]
    assert found.p == np.mean([abs(total) >= 0.1 - 1e-12 for total in flips]) == 2 / 32
    assert stats.one_sample([0.0] * 5).p == 1.0
    assert stats.one_sample([0.3]).test == "" and math.isnan(stats.one_sample([0.3]).p) and math.isnan(stats.one_sample([]).mean)


def test_the_paired_test_agrees_with_all_sign_flips():
    random = np.random.default_rng(0)
    differences = random.normal(0.01, 0.02, 12)
    flipped = np.array(list(product((-1, 1), repeat=12))) @ differences
    exact = np.mean(np.abs(flipped) >= abs(differences.sum()) - 1e-12)
    assert stats.one_sample(differences).p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_holm_agrees_with_statsmodels(seed):
    p = np.random.default_rng(seed).uniform(0, 0.2, 1 + seed)
    assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_leaves_out_what_was_not_tested():
    assert stats.holm([0.01, math.nan, 0.03]) == pytest.approx([0.02, math.nan, 0.03], nan_ok=True)
    assert len(stats.holm([])) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_mcnemar_agrees_with_statsmodels(seed):
    a, b = np.random.default_rng(seed).random((2, 40)) < [[0.7], [0.5]]
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    only_a, only_b, p = stats.mcnemar(a, b)
    assert (only_a, only_b) == (table[0][1], table[1][0])
    assert p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    assert stats.mcnemar(a, a) == (0, 0, 1.0)


@pytest.mark.parametrize("n", [3, 6, 10, 50])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_the_detectable_effect_agrees_with_statsmodels(n, power):
    expected = 0.03 * TTestPower().solve_power(nobs=n, power=power, alpha=0.05)
    assert stats.minimum_detectable_effect(0.03, n, power) == pytest.approx(expected, rel=1e-3)
    assert math.isnan(stats.minimum_detectable_effect(0.03, 1)) and stats.minimum_detectable_effect(0.0, n) == 0.0


def test_the_detectable_effect_of_two_seeds_has_its_power():
    random = np.random.default_rng(0)  # statsmodels does not reach effects above 10 sd, so here by simulation
    values = random.normal(stats.minimum_detectable_effect(1.0, 2), 1.0, (100_000, 2))
    t = values.mean(1) / (values.std(1, ddof=1) / math.sqrt(2))
    assert np.mean(np.abs(t) > scipy.stats.t.ppf(0.975, 1)) == pytest.approx(0.8, abs=0.005)


def test_groups_are_the_largest_sets_that_cannot_be_told_apart():
    random = np.random.default_rng(0)
    names = list("abcdef")
    for _ in range(50):
        p = {(x, y): random.uniform(0, 0.12) for i, x in enumerate(names) for y in names[i + 1 :]}
        alike = {frozenset(pair) for pair, value in p.items() if value >= 0.05}
        sets = [
            {name for name, bit in zip(names, bits, strict=True) if bit}
            for bits in product((0, 1), repeat=6)
            if all(frozenset((x, y)) in alike for (x, y) in p if bits[names.index(x)] and bits[names.index(y)])
        ]
        largest = [each for each in sets if each and not any(each < other for other in sets)]
        found = stats.indistinct_groups(names, p)
        assert sorted(map(sorted, largest)) == sorted(map(sorted, found))
        assert all(group == sorted(group) for group in found) and found == sorted(found)


def test_what_was_not_tested_is_not_told_apart():
    assert stats.indistinct_groups(["a", "b"], {("a", "b"): math.nan}) == [["a", "b"]]
    assert stats.indistinct_groups(["a", "b"], {("b", "a"): 0.01}) == [["a"], ["b"]]


def test_the_expected_best_agrees_with_all_draws():
    scores = [0.5, 0.61, 0.61, 0.7]
    brute = [np.mean([max(draw) for draw in product(scores, repeat=n)]) for n in range(1, 5)]
    assert stats.expected_best(scores) == pytest.approx(brute)


def test_the_bootstrap_agrees_with_resampling_one_by_one():
    random = np.random.default_rng(0)
    table = random.normal(0.05, 0.3, (8, 60)) + random.normal(0, 0.1, (8, 1))
    means = []
    for _ in range(4000):
        seeds, examples = random.integers(0, 8, 8), random.integers(0, 60, 60)
        centred = table[seeds][:, examples].mean() - table[:, examples].mean()  # the part of the seeds, widened as documented
        wider = scipy.stats.t.ppf(0.975, 7) / scipy.stats.norm.ppf(0.975) * math.sqrt(8 / 7)
        means.append(table[:, examples].mean() + wider * centred)
    low, high = stats.bootstrap_difference(table)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.012)
    assert stats.bootstrap_difference(table) == (low, high)


@pytest.mark.parametrize(("of_seeds", "of_examples", "noise"), [(0.05, 0.1, 0.3), (0.0, 0.3, 0.3), (0.1, 0.0, 0.05)])
def test_the_bootstrap_covers_the_truth(of_seeds, of_examples, noise):
    random, covered = np.random.default_rng(1), 0
    for _ in range(250):
        parts = random.normal(0, of_seeds, (6, 1)) + random.normal(0, of_examples, (1, 150)) + random.normal(0, noise, (6, 150))
        low, high = stats.bootstrap_difference(0.03 + parts, 400)
        covered += low <= 0.03 <= high
    assert covered / 250 > 0.92  # 95 % less three standard errors of the simulation


def test_the_paired_interval_covers_the_truth_and_its_test_keeps_its_level():
    random = np.random.default_rng(2)
    found = [stats.one_sample(random.normal(0.02, 0.03, 6)) for _ in range(2000)]
    assert np.mean([each.low <= 0.02 <= each.high for each in found]) == pytest.approx(0.95, abs=0.015)
    nothing = [stats.one_sample(random.normal(0, 0.03, 6)).p for _ in range(2000)]
    assert np.mean(np.array(nothing) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_variance_components_are_those_of_the_analysis_of_variance():
    random = np.random.default_rng(3)
    data, order = np.repeat(range(8), 5), np.tile(range(5), 8)
    table = random.normal(0, 2, (8, 1)) + random.normal(0, 1, (1, 5)) + random.normal(0, 0.5, (8, 5))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    residual = (rest**2).sum() / 28
    expected = {"data": table.mean(1).var(ddof=1) - residual / 5, "order": table.mean(0).var(ddof=1) - residual / 8}
    found = stats.variance_components(table.ravel(), {"data": data, "order": order})
    assert found == pytest.approx(expected | {"residual": residual})


def test_seeds_that_vary_together_are_one_component():
    scores, seeds = [0.5, 0.6, 0.7, 0.55], [0, 1, 2, 3]
    found = stats.variance_components(scores, {"data_seed": seeds, "init_seed": seeds, "order_seed": [0] * 4})
    assert found == pytest.approx({"data_seed+init_seed": np.var(scores, ddof=1), "residual": 0.0})
    assert stats.variance_components(scores, {"data_seed": [0] * 4}) == pytest.approx({"residual": np.var(scores, ddof=1)})
