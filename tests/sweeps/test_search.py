import math

import pytest

from llmft.errors import Cause
from llmft.method import Range
from sweeps.plan import SearchPlan
from sweeps.search import Outcome, best, judge, suggest

RANGES = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "r": Range(choices=(2, None, [1, 2])),
    "epochs": Range(1, 40, integer=True),
}
DEFAULTS = {"learning_rate": 1e-4, "r": 2, "epochs": 3}


def rounds(search, key="cell", score=lambda point: -abs(math.log10(point["learning_rate"]) + 3), n=None):
    history = []
    for index in range(n or math.ceil(search.n_trials / search.round_size)):
        history += [Outcome(point, score(point)) for point in suggest(RANGES, search, key, DEFAULTS, history, index)]
    return [outcome.params for outcome in history]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_rounds_follow_from_plan_and_history(sampler):
    search = SearchPlan(n_trials=10, sampler=sampler)
    points = rounds(search)
    assert points == rounds(search) and len(points) == 10
    assert points != rounds(search, key="another") and points != rounds(search.model_copy(update={"seed": 1}))
    assert all(point == {name: point[name] for name in RANGES} for point in points)
    for point in points:
        assert 1e-5 <= point["learning_rate"] <= 1e-2 and float(f"{point['learning_rate']:.6g}") == point["learning_rate"]
        assert point["r"] in (2, None, [1, 2]) and isinstance(point["epochs"], int)


def test_the_defaults_are_tried_first_if_the_ranges_hold_them():
    assert rounds(SearchPlan(n_trials=2))[0] == DEFAULTS
    outside = suggest({"learning_rate": RANGES["learning_rate"]}, SearchPlan(n_trials=1), "cell", {"learning_rate": 1.0}, [], 0)
    assert outside[0]["learning_rate"] <= 1e-2


def test_a_longer_search_begins_like_a_shorter_one():
    assert rounds(SearchPlan(n_trials=12))[:5] == rounds(SearchPlan(n_trials=5))


def test_later_rounds_listen_to_earlier_ones():
    search = SearchPlan(n_trials=16)
    assert rounds(search) != rounds(search, score=lambda point: point["learning_rate"])
    suggest(RANGES, search, "cell", DEFAULTS, [Outcome(DEFAULTS, None)] * 4, 1)  # dead points alone do not stop a search


def test_points_are_not_tried_twice_while_there_are_others():
    points = suggest({"r": Range(choices=(1, 2, 3))}, SearchPlan(n_trials=3), "cell", {"r": 1}, [], 0)
    assert sorted(point["r"] for point in points) == [1, 2, 3]
    assert len(suggest({"r": Range(choices=(1,))}, SearchPlan(n_trials=3), "cell", {"r": 1}, [], 0)) == 3


def test_a_dead_seed_is_a_dead_point(small_cells):
    from fakes import fake_record

    _, cells = small_cells()
    specs = [cells[-1].search_spec({"learning_rate": 1e-3, "r": 2}, seed) for seed in (100, 101)]
    alive = judge({}, [fake_record(spec) for spec in specs], "best_dev")
    assert alive.accuracy == pytest.approx(0.9 + 0.001 * (100 % 7 + 101 % 7) / 2) and alive.loss == 0
    dead = judge({}, [fake_record(specs[0]), fake_record(specs[1], Cause.DIVERGED)], "best_dev")
    assert dead.accuracy is None and best([dead, alive]) is alive and best([dead]) is None


def test_ties_go_to_the_lower_loss_then_to_the_earlier_point():
    first, surer, same = Outcome({"a": 1}, 0.5, 2.0), Outcome({"a": 2}, 0.5, 1.0), Outcome({"a": 3}, 0.5, 1.0)
    assert best([first, surer, same]) is surer
