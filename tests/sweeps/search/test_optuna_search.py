import itertools
import logging
import math
import warnings

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import fake_record

from llmft.errors import Cause, UserError
from llmft.methods._base import SearchRange
from llmft.seeds import derive
from sweeps.planning.schema import SearchPlan
from sweeps.planning.search_space import Space
from sweeps.search.optuna_search import N_STARTUP, PointOutcome, Search, best_point, summarize_point

RANGES = {
    "learning_rate": SearchRange(1e-5, 1e-2, log=True),
    "r": SearchRange(choices=(2, None, [1, 2])),
    "epochs": SearchRange(1, 40, integer=True),
}
DEFAULTS = {"learning_rate": 1e-4, "r": 2, "epochs": 3}
SAMPLERS = ["tpe", "random", "grid"]


def score(point):
    return -abs(math.log10(point["learning_rate"]) + 3) - abs(point.get("epochs", 20) - 20) / 20


def run(search, score=score, n=None):
    """Every point of the search, and how it did."""
    for index in range(search.n_rounds if n is None else n):
        search.tell(index, [PointOutcome(point, score(point)) for point in search.ask(index)])
    return [point for index in range(search.n_rounds if n is None else n) for point in search.ask(index)]


def points(plan, ranges=RANGES, defaults=DEFAULTS, key="cell", score=score):
    return run(Search(Space(ranges), plan, key, {name: value for name, value in defaults.items() if name in ranges}), score)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rounds_follow_from_plan_and_outcomes(sampler):
    plan = SearchPlan(n_trials=26, sampler=sampler)
    found = points(plan)
    assert found == points(plan) and len(found) == 26
    if sampler != "grid":
        assert found != points(plan, key="another") and found != points(plan.model_copy(update={"seed": 1}))
    for point in found:
        assert point.keys() == RANGES.keys() and point["r"] in (2, None, [1, 2]) and isinstance(point["epochs"], int)
        assert 1e-5 <= point["learning_rate"] <= 1e-2 and float(f"{point['learning_rate']:.6g}") == point["learning_rate"]
        assert found.count(point) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_that_is_told_something_else_changes_what_follows_and_nothing_before(sampler):
    plan = SearchPlan(n_trials=20, sampler=sampler)
    search = Search(Space(RANGES), plan, "cell", DEFAULTS)
    first = run(search)

    def other(point):
        return -score(point) if point in first[8:] else score(point)

    changed = run(search, other)
    assert changed == points(plan, score=other) and changed[:12] == first[:12]
    assert run(search) == first
    assert (changed == first) == (sampler in ("random", "grid"))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_defaults_are_tried_first_if_the_ranges_hold_them(sampler):
    assert points(SearchPlan(n_trials=2, sampler=sampler))[0] == DEFAULTS
    outside = points(SearchPlan(n_trials=1, sampler=sampler), {"learning_rate": RANGES["learning_rate"]}, {"learning_rate": 1.0})
    assert outside[0]["learning_rate"] <= 1e-2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_longer_search_begins_like_a_shorter_one(sampler):
    assert points(SearchPlan(n_trials=22, sampler=sampler))[:13] == points(SearchPlan(n_trials=13, sampler=sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_dead_points_alone_do_not_stop_a_search(sampler):
    assert len(points(SearchPlan(n_trials=24, sampler=sampler), score=lambda point: None)) == 24


def test_points_are_not_tried_twice_and_a_space_that_is_tried_in_full_is_done():
    assert sorted(
        point["r"] for point in points(SearchPlan(n_trials=3), {"r": SearchRange(choices=(1, 2, 3))}, {"r": 1}, score=lambda point: 1.0)
    ) == [1, 2, 3]
    for sampler in SAMPLERS:
        plan = SearchPlan(n_trials=30, sampler=sampler)
        ranges = {"r": SearchRange(choices=(1, 2)), "alpha": SearchRange(1, 3, integer=True)}
        tried = points(plan, ranges, {"r": 1, "alpha": 1}, score=lambda point: 1.0)
        assert len(tried) <= 6 and tried[0] == {"r": 1, "alpha": 1}
        assert points(plan, {"r": SearchRange(choices=(1,))}, {"r": 1}, score=lambda point: 1.0) == [{"r": 1}]


def plain_optuna(sampler_of, space, plan, n_rounds):
    """Ask for a round, tell it, and so on, with nothing of ours but the seeds."""
    study = optuna.create_study(direction="maximize")
    for index in range(n_rounds):
        study.sampler = sampler_of(derive(plan.seed, f"cell/{index}") % 2**32)
        trials = [study.ask(space) for _ in range(plan.round_size)]
        for trial in trials:
            study.tell(trial, score(trial.params))
    return study.get_trials()


SPACE = {
    "epochs": optuna.distributions.IntDistribution(1, 40),
    "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("tpe", lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_STARTUP)),
        ("random", lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    ],
)
def test_suggestions_are_those_of_a_plain_optuna_study(name, sampler):
    plan, n_rounds = SearchPlan(n_trials=32, sampler=name, seed=5), 8
    expected = plain_optuna(sampler, SPACE, plan, n_rounds)
    found = points(plan, {name: RANGES[name] for name in SPACE}, {"learning_rate": 1.0, "epochs": 3})
    assert [point["epochs"] for point in found] == [trial.params["epochs"] for trial in expected]
    assert [point["learning_rate"] for point in found] == pytest.approx([trial.params["learning_rate"] for trial in expected], rel=1e-5)


def test_later_rounds_are_better_than_chance():
    def late(sampler):
        plan, ranges = SearchPlan(n_trials=48, sampler=sampler), {name: RANGES[name] for name in SPACE}
        return sum(sum(map(score, points(plan, ranges, DEFAULTS, key=f"cell {i}")[-16:])) for i in range(5))

    assert late("tpe") > 0.7 * late("random")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("names", [("r",), ("learning_rate",), ("r", "epochs"), tuple(RANGES)])
def test_no_space_makes_optuna_warn(sampler, names, caplog):
    ranges = {name: RANGES[name] for name in names}
    optuna.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            found = points(
                SearchPlan(n_trials=28, sampler=sampler), ranges, DEFAULTS, score=lambda point: score({"learning_rate": 1e-3} | point)
            )  # fmt: skip
    finally:
        optuna.logging.disable_propagation()
    assert len(found) == (3 if names == ("r",) else 28) and not caplog.records


def test_a_gaussian_process_proposes_what_plain_optuna_would(caplog):
    """Fewer points than for the others: each takes a second."""
    ranges = {name: RANGES[name] for name in ("learning_rate", "r")}
    space = {"learning_rate": SPACE["learning_rate"], "r": optuna.distributions.CategoricalDistribution(range(3))}
    plan = SearchPlan(n_trials=8, sampler="gp", round_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried = points(plan, ranges, {"learning_rate": 1.0, "r": 2})
    assert tried == points(plan, ranges, {"learning_rate": 1.0, "r": 2}) and not caplog.records
    expected = plain_optuna(lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=N_STARTUP), space, plan, 4)
    assert [point["learning_rate"] for point in tried] == pytest.approx([trial.params["learning_rate"] for trial in expected], rel=1e-5)
    assert [point["r"] for point in tried] == [RANGES["r"].choices[trial.params["r"]] for trial in expected]
    assert points(plan.model_copy(update={"n_trials": 7}), ranges, {"learning_rate": 1.0, "r": 2}) == tried[:7]
    assert points(plan.model_copy(update={"seed": 1}), ranges, {"learning_rate": 1.0, "r": 2})[6:] != tried[6:]
    assert points(plan, ranges, {"learning_rate": 1e-4, "r": None})[0] == {"learning_rate": 1e-4, "r": None}  # the defaults


GRID = {
    "alpha": SearchRange(1, 9, integer=True),
    "learning_rate": SearchRange(1e-4, 1e-2, log=True),
    "r": SearchRange(choices=(2, 8)),
}


def test_a_grid_is_the_product_of_its_values():
    expected = [dict(zip(GRID, values, strict=True)) for values in itertools.product((1, 5, 9), (1e-4, 1e-3, 1e-2), (2, 8))]
    assert points(SearchPlan(n_trials=18, sampler="grid", round_size=5), GRID, {}) == expected
    more = points(SearchPlan(n_trials=23, sampler="grid", round_size=5), GRID, {})
    assert more[:18] == expected and len({repr(point) for point in more}) == 23  # what does not make a whole value is random
    assert points(SearchPlan(n_trials=23, sampler="grid", round_size=50), GRID, {})[:18] == expected


def test_a_grid_that_does_not_fit_is_a_mistake():
    with pytest.raises(UserError, match="has 8 points; set n_trials to at least 8, or give fewer choices"):
        Space(GRID).grid(7)


def test_ranges_grow_in_turn_as_far_as_they_fit():
    two = {"a": SearchRange(0.0, 1.0), "b": SearchRange(1, 3, integer=True)}
    sizes = {n: [len({point[name] for point in Space(two).grid(n)}) for name in two] for n in (4, 5, 6, 8, 9, 11, 12, 30)}
    assert sizes == {4: [2, 2], 5: [2, 2], 6: [3, 2], 8: [4, 2], 9: [3, 3], 11: [3, 3], 12: [4, 3], 30: [10, 3]}


names = st.sampled_from("abcdef")


SPANS = st.sampled_from(
    [
        SearchRange(choices=(1, 2, "x")), SearchRange(1, 4, integer=True), SearchRange(0.5, 2.0),
        SearchRange(1e-3, 1.0, log=True),
    ]
)  # fmt: skip
spaces = st.dictionaries(names, SPANS, min_size=1)


def in_range(span, value):
    return value in span.choices if span.choices else span.low <= value <= span.high


@settings(max_examples=40, deadline=None)
@given(spaces, st.sampled_from(SAMPLERS), st.integers(1, 30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_point_of_every_sampler_lies_in_its_ranges(ranges, sampler, n_trials, round_size, rng):
    try:
        search = Search(Space(ranges), SearchPlan(n_trials=n_trials, sampler=sampler, round_size=round_size), "cell", dict.fromkeys(ranges))
    except UserError:
        return  # a grid that does not fit
    told = {}
    tried = run(search, lambda point: told.setdefault(repr(point), rng.choice([None, rng.random()])))
    assert len(tried) == search.n_points <= n_trials
    assert all(point.keys() == ranges.keys() and all(in_range(ranges[name], point[name]) for name in ranges) for point in tried)
    assert len({repr(point) for point in tried}) == len(tried) or search.n_points == search.space.size


@settings(max_examples=60, deadline=None)
@given(spaces, st.integers(1, 40))
def test_a_grid_holds_every_combination(ranges, n_points):
    try:
        grid = Space(ranges).grid(n_points)
    except UserError:
        return
    values = [list(dict.fromkeys(repr(point[name]) for point in grid)) for name in sorted(ranges)]
    combinations = [tuple(repr(point[name]) for name in sorted(ranges)) for point in grid]
    assert combinations == list(itertools.product(*values)) and len(grid) <= n_points
    for name, span in ranges.items():
        tried = [point[name] for point in grid]
        assert set(map(repr, tried)) == set(map(repr, span.choices)) if span.choices else {min(tried), max(tried)} == {span.low, span.high}


def test_true_is_not_one():
    ranges = {"a": SearchRange(choices=(True, 2)), "b": SearchRange(choices=(1, 2))}
    space = Space(ranges)
    assert space.contains({"a": True, "b": 1}) and not space.contains({"a": 1}) and not space.contains({"b": True})


def test_a_dead_seed_is_a_dead_point(small_cells):
    _, cells = small_cells()
    specs = [cells[-1].search_spec({"learning_rate": 1e-3, "r": 2}, seed) for seed in (100, 101)]
    alive = summarize_point({}, [fake_record(spec) for spec in specs], "best_dev")
    assert alive.score == pytest.approx(0.9 + 0.001 * (100 % 7 + 101 % 7) / 2) and alive.loss == 0
    dead = summarize_point({}, [fake_record(specs[0]), fake_record(specs[1], Cause.DIVERGED)], "best_dev")
    assert dead.score is None and not dead.pruned and best_point([dead, alive]) is alive and best_point([dead]) is None


def test_ties_go_to_the_lower_loss_then_to_the_earlier_point():
    first, surer, same = PointOutcome({"a": 1}, 0.5, 2.0), PointOutcome({"a": 2}, 0.5, 1.0), PointOutcome({"a": 3}, 0.5, 1.0)
    assert best_point([first, surer, same]) is surer


def test_optuna_is_told_how_points_ended():
    search = Search(Space(RANGES), SearchPlan(n_trials=3), "cell", DEFAULTS)
    alive, dead, pruned = search.ask(0)
    search.tell(0, [PointOutcome(alive, 0.5), PointOutcome(dead, None), PointOutcome(pruned, None, curve={5: 0.25, 6: 0.375}, pruned=True)])
    trials = search._study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "PRUNED"]
    assert trials[0].value == 0.5 and trials[2].intermediate_values == {5: 0.25, 6: 0.375}
