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
CONDITIONAL = {
    "schedule": SearchRange(choices=("constant", "linear", "cosine")),
    "warmup_ratio": SearchRange(0.0, 0.5, when={"schedule": ("linear", "cosine")}),
    "learning_rate": SearchRange(1e-5, 1e-2, log=True),
    "epochs": SearchRange(1, 40, integer=True),
    "clip_norm": SearchRange(choices=(None, 0.1), when={"epochs": 7, "schedule": "cosine"}),
}
CONDITIONAL_DEFAULTS = {"schedule": "linear", "warmup_ratio": 0.1, "learning_rate": 1e-4, "epochs": 7}
SAMPLERS = ["tpe", "random", "grid", "cmaes"]


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
    search = Search(Space(CONDITIONAL), plan, "cell", CONDITIONAL_DEFAULTS)
    first = run(search)

    def other(point):
        return -score(point) if point in first[8:] else score(point)

    changed = run(search, other)
    assert changed == points(plan, CONDITIONAL, CONDITIONAL_DEFAULTS, score=other) and changed[:12] == first[:12]
    assert run(search) == first
    assert (changed == first) == (sampler in ("random", "grid"))


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_the_defaults_are_tried_first_if_the_ranges_hold_them(sampler):
    assert points(SearchPlan(n_trials=2, sampler=sampler))[0] == DEFAULTS
    outside = points(SearchPlan(n_trials=1, sampler=sampler), {"learning_rate": RANGES["learning_rate"]}, {"learning_rate": 1.0})
    assert outside[0]["learning_rate"] <= 1e-2
    assert points(SearchPlan(n_trials=2, sampler=sampler), CONDITIONAL, CONDITIONAL_DEFAULTS)[0] == CONDITIONAL_DEFAULTS


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
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
        ranges = {"r": SearchRange(choices=(1, 2)), "alpha": SearchRange(1, 3, integer=True, when={"r": 2})}
        found = points(plan, ranges, {"r": 1}, score=lambda point: 1.0)
        assert len(found) <= 4 and found[0] == {"r": 1}
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


SPACE = {"epochs": optuna.distributions.IntDistribution(1, 40), "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("tpe", lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_STARTUP)),
        ("random", lambda seed: optuna.samplers.RandomSampler(seed=seed)),
        ("cmaes", lambda seed: optuna.samplers.CmaEsSampler(seed=seed, popsize=8)),  # 4 + 3 ln 2 is 6, and rounds hold 4
    ],
)
def test_suggestions_are_those_of_a_plain_optuna_study(name, sampler):
    plan, n_rounds = SearchPlan(n_trials=32, sampler=name, seed=5), 8
    expected = plain_optuna(sampler, SPACE, plan, n_rounds)
    found = points(plan, {name: RANGES[name] for name in SPACE}, {"learning_rate": 1.0, "epochs": 3})
    assert [point["epochs"] for point in found] == [trial.params["epochs"] for trial in expected]
    assert [point["learning_rate"] for point in found] == pytest.approx([trial.params["learning_rate"] for trial in expected], rel=1e-5)
    assert name != "cmaes" or {trial.system_attrs.get("cma:generation") for trial in expected} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_later_rounds_are_better_than_chance(sampler):
    def late(sampler):
        plan, ranges = SearchPlan(n_trials=48, sampler=sampler), {name: RANGES[name] for name in SPACE}
        return sum(sum(map(score, points(plan, ranges, DEFAULTS, key=f"cell {i}")[-16:])) for i in range(5))

    assert late(sampler) > 0.7 * late("random")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("names", [("schedule",), ("learning_rate",), ("schedule", "warmup_ratio"), tuple(CONDITIONAL)])
def test_no_space_makes_optuna_warn(sampler, names, caplog):
    ranges = {name: CONDITIONAL[name] for name in names}
    optuna.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            found = points(
                SearchPlan(n_trials=28, sampler=sampler), ranges, {name: CONDITIONAL_DEFAULTS.get(name) for name in names},
                score=lambda point: score({"learning_rate": 1e-3} | point),
            )  # fmt: skip
    finally:
        optuna.logging.disable_propagation()
    assert len(found) == (3 if names == ("schedule",) else 28) and not caplog.records


def test_what_has_a_condition_is_modelled_where_it_is_searched():
    """TPE finds the best warm-up among the points that have one; points without it must not blur its model."""

    def wants_warmup(point):
        return 1 - abs(point["warmup_ratio"] - 0.4) if "warmup_ratio" in point else 0.0

    ranges = {name: CONDITIONAL[name] for name in ("schedule", "warmup_ratio")}
    late = points(SearchPlan(n_trials=48), ranges, {"schedule": "constant"}, score=wants_warmup)[-12:]
    assert sum(map(wants_warmup, late)) / len(late) > 0.85  # at random: 2/3 * 0.83


GRID = {
    "alpha": SearchRange(1, 9, integer=True, levels=3),
    "learning_rate": SearchRange(1e-4, 1e-2, log=True),
    "r": SearchRange(choices=(2, 8)),
}


def test_a_grid_is_the_product_of_its_levels():
    expected = [dict(zip(GRID, values, strict=True)) for values in itertools.product((1, 5, 9), (1e-4, 1e-3, 1e-2), (2, 8))]
    assert points(SearchPlan(n_trials=18, sampler="grid", round_size=5), GRID, {}) == expected
    more = points(SearchPlan(n_trials=23, sampler="grid", round_size=5), GRID, {})
    assert more[:18] == expected and len({repr(point) for point in more}) == 23  # what does not make a whole level is random
    assert points(SearchPlan(n_trials=23, sampler="grid", round_size=50), GRID, {})[:18] == expected


def test_a_grid_leaves_out_what_is_not_searched():
    ranges = {
        "r": SearchRange(choices=(2, 8)),
        "b": SearchRange(0.0, 1.0, when={"r": 8}),
        "c": SearchRange(choices=("x", "y"), when={"b": 1.0}),
    }
    with pytest.raises(UserError, match="c: never searched"):  # a continuous range comes upon no value exactly
        Space(ranges)
    ranges["c"] = SearchRange(choices=("x", "y"), when={"r": (8, 2)})
    expected = [{"r": 2, "c": "x"}, {"r": 2, "c": "y"}] + [
        {"r": 8, "b": b, "c": c} for b, c in itertools.product((0.0, 0.5, 1.0), ("x", "y"))
    ]
    assert Space(ranges).grid(8) == expected == Space(ranges).grid(9) and len(Space(ranges).grid(10)) == 10
    with pytest.raises(UserError, match="has 6 points; set n_trials to at least 6"):
        Space(ranges).grid(5)


def test_levels_grow_in_turn_as_far_as_they_fit():
    two = {"a": SearchRange(0.0, 1.0), "b": SearchRange(1, 3, integer=True)}
    sizes = {n: [len({point[name] for point in Space(two).grid(n)}) for name in two] for n in (4, 5, 6, 8, 9, 11, 12, 30)}
    assert sizes == {4: [2, 2], 5: [2, 2], 6: [3, 2], 8: [4, 2], 9: [3, 3], 11: [3, 3], 12: [4, 3], 30: [10, 3]}


names = st.sampled_from("abcdef")


@st.composite
def spaces(draw):
    """Ranges of which each may ask something of those that stand before it in the alphabet."""
    ranges = {}
    for name in sorted(draw(st.sets(names, min_size=1))):
        kind = draw(st.sampled_from(["choices", "integer", "float", "log"]))
        span = {"choices": {"choices": (1, 2, "x")}, "integer": {"low": 1, "high": 4, "integer": True}, "float": {"low": 0.5, "high": 2.0},
                "log": {"low": 1e-3, "high": 1.0, "log": True}}[kind]  # fmt: skip
        parents = [other for other, it in ranges.items() if it.choices or it.integer]
        when = {
            other: draw(st.sampled_from([1, 2, (1, 2)])) for other in draw(st.sets(st.sampled_from(parents)) if parents else st.just(()))
        }
        ranges[name] = SearchRange(**span, when=when)
    return ranges


def may_be(ranges, point):
    """Whether a point has exactly the hyper-parameters whose conditions hold, each in its range; written out on its own."""
    for name, span in sorted(ranges.items()):
        active = all(other in point and point[other] in wanted for other, wanted in span.when.items())
        if active != (name in point):
            return False
        if active and not (point[name] in span.choices if span.choices else span.low <= point[name] <= span.high):
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(SAMPLERS), st.integers(1, 30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_point_of_every_sampler_obeys_the_conditions(ranges, sampler, n_trials, round_size, rng):
    try:
        search = Search(Space(ranges), SearchPlan(n_trials=n_trials, sampler=sampler, round_size=round_size), "cell", {})
    except UserError:
        return  # a condition that never holds, or a grid that does not fit
    told = {}
    found = run(search, lambda point: told.setdefault(repr(point), rng.choice([None, rng.random()])))
    assert len(found) == search.n_points <= n_trials and all(may_be(ranges, point) for point in found)
    assert len({repr(point) for point in found}) == len(found) or search.n_points == search.space.size


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(1, 40))
def test_a_grid_holds_every_combination_that_may_be(ranges, n_points):
    try:
        grid = Space(ranges).grid(n_points)
    except UserError:
        return
    values = {name: sorted({point[name] for point in grid if name in point}, key=str) for name in ranges}
    every = [
        {name: value for name, value in zip(ranges, combination, strict=True) if value is not ...}
        for combination in itertools.product(*[[*values[name], ...] for name in ranges])
    ]
    allowed = {repr(sorted(point.items())) for point in every if may_be(ranges, point)}
    assert {repr(sorted(point.items())) for point in grid} == allowed and len(grid) == len(allowed) <= n_points


def test_conditions_in_a_circle_are_a_mistake():
    with pytest.raises(UserError, match="circle: (a needs b needs a|b needs a needs b)"):
        Space({"a": SearchRange(choices=(1, 2), when={"b": 1}), "b": SearchRange(choices=(1, 2), when={"a": 1})})


def test_conditions_that_never_hold_together_are_a_mistake():
    ranges = {"a": SearchRange(choices=(1, 2)), "b": SearchRange(choices=(1, 2), when={"a": 1})}
    Space({**ranges, "c": SearchRange(0.0, 1.0, when={"a": 1, "b": 2})})
    with pytest.raises(UserError, match="c: never searched, for what it asks of a and b never holds"):
        Space({**ranges, "c": SearchRange(0.0, 1.0, when={"a": 2, "b": 2})})


def test_true_is_not_one():
    ranges = {"a": SearchRange(choices=(True, 1)), "b": SearchRange(0.0, 1.0, when={"a": True})}
    assert Space(ranges).active("b", {"a": True}) and not Space(ranges).active("b", {"a": 1})


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
