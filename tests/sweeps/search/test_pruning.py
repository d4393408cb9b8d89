"""The floors under which a trial is given up, and how records are read that came about under others."""

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import fake_training

from llmft.config.spec import TrainSpec
from llmft.errors import Cause
from sweeps.planning.schema import PrunePlan
from sweeps.search.optuna_search import best_point, summarize_point
from sweeps.search.pruning import counts, curve, given_up_at, mean_curve, pruning_thresholds

accuracy = st.floats(0, 1).map(lambda value: round(value, 4))


def rising(values):
    """A curve with a look at every epoch."""
    found, best = {}, 0.0
    for epoch, value in enumerate(values, 1):
        best = found[epoch] = max(best, value)
    return found


@settings(deadline=None)
@given(st.lists(st.lists(accuracy, min_size=1, max_size=12), max_size=9), st.integers(1, 6), st.integers(1, 4))
def test_the_median_of_what_came_so_far(values, min_epochs, min_points):
    curves = [rising(row) for row in values]
    plan = PrunePlan(rule="median", min_epochs=min_epochs, min_points=min_points)
    expected = {}
    for epoch in range(min_epochs, 12):
        so_far = [max(row[:epoch]) for row in values if len(row) >= epoch]
        if len(so_far) >= min_points:
            expected[epoch] = statistics.median(so_far)
    found = pruning_thresholds(plan, TrainSpec(epochs=12), curves)
    assert found == pytest.approx(expected, abs=2e-6) and all(found[epoch] <= expected[epoch] + 1e-12 for epoch in found)


@settings(deadline=None)  # the first example imports Ray
@given(st.lists(st.lists(accuracy, min_size=1, max_size=30), max_size=9), st.sampled_from([2, 3, 4]))
def test_the_rungs_of_asha_are_those_of_ray(values, reduction_factor):
    from ray.tune.schedulers.async_hyperband import _Bracket

    bracket = _Bracket(2, 30, reduction_factor, 0)
    rungs = [rung for rung, _ in bracket._rungs if rung < 30]
    came = {rung: {i: max(row[:rung]) for i, row in enumerate(values) if len(row) >= rung} for rung in rungs}
    expected = {rung: bracket.cutoff(recorded) for rung, recorded in came.items() if recorded}
    plan = PrunePlan(rule="asha", min_epochs=2, reduction_factor=reduction_factor, min_points=1)
    assert pruning_thresholds(plan, TrainSpec(epochs=30), map(rising, values)) == pytest.approx(expected, abs=2e-6)


def test_floors_stand_where_the_trial_looks_and_not_at_its_end():
    curves = [rising([0.5] * 40)] * 4
    median, asha = PrunePlan(rule="median"), PrunePlan(rule="asha", min_epochs=2, reduction_factor=3)
    assert list(pruning_thresholds(median, TrainSpec(epochs=9), curves)) == [5, 6, 7, 8]
    assert list(pruning_thresholds(median, TrainSpec(epochs=9, eval_every_epochs=4), curves)) == [8]
    assert list(pruning_thresholds(median, TrainSpec(epochs=8, eval_every_epochs=4), curves)) == []
    assert list(pruning_thresholds(asha, TrainSpec(epochs=40, eval_every_epochs=4), curves)) == [4, 8, 20]  # rungs 2, 6 and 18
    assert pruning_thresholds(None, TrainSpec(), curves) == {} == pruning_thresholds(median, TrainSpec(), curves[:3])


def test_a_curve_between_its_looks_is_as_good_as_at_the_last():
    assert pruning_thresholds(PrunePlan(rule="median", min_points=1), TrainSpec(epochs=9), [{2: 0.25, 6: 0.5, 10: 0.75}]) == {
        5: 0.25,
        6: 0.5,
        7: 0.5,
        8: 0.5,
    }


def test_a_mean_as_good_as_the_floor_is_not_below_it():
    third = mean_curve([{5: 0.1}, {5: 0.2}, {5: 0.3}])
    assert third[5] == pytest.approx(0.2)
    assert pruning_thresholds(PrunePlan(rule="median", min_points=1), TrainSpec(), [third])[5] <= 0.2
    assert pruning_thresholds(PrunePlan(rule="median", min_points=1), TrainSpec(), [{5: 0.2 + 1e-15}])[5] <= 0.2


@pytest.fixture
def spec(small_cells):
    return small_cells(("epochs: 2", "epochs: 20"))[1][-1].search_spec({"learning_rate": 1e-3, "r": 2}, 100)


def test_a_record_counts_for_floors_that_it_answers(spec):
    full = fake_training(spec, {})
    bests = curve(full)
    early, late = {6: bests[6] + 0.01}, {12: bests[12] + 0.01}
    pruned = fake_training(spec, early)
    assert full.finished and pruned.cause is Cause.PRUNED and max(curve(pruned)) == 6
    assert all(counts(full, stop_below) for stop_below in ({}, early, late))
    assert (given_up_at(full, early), given_up_at(full, late), given_up_at(full, {6: bests[6]})) == (6, 12, None)
    assert counts(pruned, early) and not counts(pruned, {}) and not counts(pruned, late)
    assert counts(pruned, {5: bests[5] + 0.01}) and given_up_at(pruned, {5: bests[5] + 0.01}) == 5
    assert counts(pruned.model_copy(update={"curve": []}), early) and not counts(pruned.model_copy(update={"curve": []}), {})
    assert counts(fake_training(spec, late), early)


def test_a_point_with_a_pruned_seed_is_pruned_and_never_chosen(small_cells):
    cell = small_cells(("epochs: 2", "epochs: 20"))[1][-1]
    specs = [cell.search_spec({"learning_rate": 1e-3, "r": 2}, seed) for seed in (100, 101)]
    whole = [fake_training(spec, {}) for spec in specs]
    bests = [curve(record) for record in whole]
    alive = summarize_point({}, whole, "best_dev")
    assert alive.score == pytest.approx(sum(record.dev_score["best_dev"] for record in whole) / 2)
    assert alive.curve == pytest.approx({epoch: (bests[0][epoch] + bests[1][epoch]) / 2 for epoch in bests[0]})
    stop_below = {8: min(bests[0][8], bests[1][8]) + 1e-4, 12: 0.0}
    for records in ([fake_training(spec, stop_below) for spec in specs], whole):  # given up, or read as if it had been
        pruned = summarize_point({}, records, "best_dev", stop_below)
        assert pruned.pruned and pruned.score is None and max(pruned.curve) == 8
        assert pruned.curve == {epoch: alive.curve[epoch] for epoch in range(1, 9)} and best_point([pruned, alive]) is alive
    dead = summarize_point({}, [whole[0], whole[1].model_copy(update={"status": "failed", "cause": Cause.DIVERGED})], "best_dev")
    assert dead.score is None and not dead.pruned and best_point([pruned, dead]) is None


def stopped_early(record, epoch):
    """The record of the same training, ended by its patience after this epoch."""
    points = [point for point in record.curve if point.epoch <= epoch]
    dev = dict.fromkeys(record.dev_score, max(point.dev_score for point in points))
    return record.model_copy(update={"curve": points, "dev_score": dev})


def test_a_training_that_ended_early_stays_as_good_as_it_was(small_cells):
    cell = small_cells(("epochs: 2", "epochs: 20, eval_every_epochs: 3, patience: 2"))[1][-1]
    whole = [fake_training(cell.search_spec({"learning_rate": 1e-3, "r": 2}, seed), {}) for seed in (100, 101)]
    looks = [3, 6, 9, 12, 15, 18, 20]
    early = stopped_early(whole[0], 9)
    expected = {epoch: curve(whole[0])[min(epoch, 9)] for epoch in looks}
    assert curve(early) == expected and list(curve(whole[0])) == looks
    # the mean over the seeds goes on to the end, and the point counts among those that came so far
    point = summarize_point({}, [early, whole[1]], "best_dev")
    assert point.curve == pytest.approx({epoch: (expected[epoch] + curve(whole[1])[epoch]) / 2 for epoch in looks})
    assert point.score == pytest.approx((expected[20] + whole[1].dev_score["best_dev"]) / 2)
    (floor,) = pruning_thresholds(PrunePlan(rule="median", min_epochs=18, min_points=1), early.spec.train, [curve(early)]).items()
    assert floor == (18, pytest.approx(expected[18], abs=2e-6))
    # a floor behind its end was never in force; one before it was
    assert given_up_at(early, {12: 1.0}) is None and counts(early, {12: 1.0}) and given_up_at(early, {6: 1.0, 12: 1.0}) == 6
    alive = summarize_point({}, [early, early], "best_dev", {12: 1.0})
    assert alive.score == pytest.approx(expected[20]) and not alive.pruned
    # beside a seed that was given up, the mean ends where that one did
    pruned = summarize_point({}, [early, fake_training(whole[1].spec, {15: 1.0})], "best_dev", {15: 1.0})
    assert pruned.pruned and list(pruned.curve) == [3, 6, 9, 12, 15]


def test_what_a_run_under_the_lowest_floors_tells_holds_for_all(spec):
    rng = random.Random(0)
    bests = curve(fake_training(spec, {}))
    for _ in range(50):
        two = [{epoch: best + rng.uniform(-0.1, 0.02) for epoch, best in bests.items() if rng.random() < 0.7} for _ in range(2)]
        lowest = {epoch: min(two[0][epoch], two[1][epoch]) for epoch in two[0].keys() & two[1].keys()}
        record = fake_training(spec, lowest)
        for stop_below in two:
            assert counts(record, stop_below)
            assert given_up_at(record, stop_below) == given_up_at(fake_training(spec, {}), stop_below)
