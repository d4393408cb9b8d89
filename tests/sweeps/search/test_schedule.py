import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import fake_record
from support.schedules import finish, honest, outcome, searched_cells, undisturbed

from llmft.errors import Cause
from sweeps.search.schedule import RecordBook, Schedule


@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_any_interruption_give_the_same_trials(small_cells, seed):
    _, cells = small_cells()
    expected = outcome(Schedule(cells), finish(Schedule(cells), {}, random.Random(0)))
    rng, records = random.Random(seed), {}
    for _ in range(4):  # killed three times: a new schedule knows only the records
        finish(Schedule(cells), records, rng, stop_after=rng.randint(1, 12))
    finish(Schedule(cells), records, rng)
    assert outcome(Schedule(cells), records) == expected
    assert Schedule(cells).done(records) and Schedule(cells).total(records) == len(records) == len(expected[0])


def test_totals_are_known_before_anything_has_run(small_cells):
    _, cells = small_cells()
    schedule = Schedule(cells)
    expected = 1 + 3 + 2 * (4 * 2 + 3)  # zero-shot; in-context; LoRA with 2 and 4 shots: 4 points x 2 seeds, and 3 seeds
    assert schedule.total({}) == expected and not schedule.done({})
    records = finish(schedule, {}, random.Random(1))
    assert len(records) == schedule.total(records) == expected
    assert all(choice.n_search_trials in (0, 8) for choice in schedule.choices(records))


def test_a_cell_whose_search_failed_is_not_reported(small_cells):
    _, cells = small_cells()
    schedule = Schedule(cells)
    records = finish(
        schedule,
        {},
        random.Random(2),
        lambda spec: Cause.DIVERGED if spec.n_shots == 4 and spec.method == "lora" and spec.data_seed == 101 else None,
    )
    (failed,) = [state for state in schedule.states(records) if state.failed]
    assert failed.cell.base.n_shots == 4 and failed.report == [] and schedule.done(records)
    assert schedule.total(records) == len(records)
    assert [choice.params for choice in schedule.choices(records)].count(None) == 1


def test_the_search_runs_before_the_report_and_a_longer_plan_runs_the_difference(small_cells):
    _, cells = small_cells()
    ready = Schedule(cells).ready({})
    assert not any(trial.spec.method == "lora" and trial.spec.data_seed < 100 for trial in ready)
    records = finish(Schedule(cells), {}, random.Random(3))
    _, more_seeds = small_cells(("seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]"))
    assert len(Schedule(more_seeds).ready(records)) == 3  # one for each cell that has seeds
    _, longer = small_cells(("n_trials: 4", "n_trials: 6"))
    ready = Schedule(longer).ready(records)
    assert len(ready) == 2 * 2 * 2 and all(trial.spec.data_seed >= 100 for trial in ready)


@settings(max_examples=3, deadline=None)
@pytest.mark.parametrize("rule", [None, "median", "asha"])
@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@given(rng=st.randoms(use_true_random=False), other_rule=st.sampled_from([None, "median", "asha"]))
def test_whatever_was_there_and_whatever_stops_it_a_search_ends_the_same(sampler, rule, rng, other_rule):
    cells, (_, expected) = searched_cells(sampler, rule), undisturbed(sampler, rule)
    of_another_plan, _ = undisturbed(sampler, other_rule)
    records = RecordBook({digest: record for digest, record in of_another_plan.items() if rng.random() < 0.5})
    for _ in range(3):  # killed twice
        finish(Schedule(cells), records, rng, run=honest, stop_after=rng.randint(0, 30))
    finish(Schedule(cells), records, rng, run=honest)
    assert outcome(Schedule(cells), records) == expected
    assert Schedule(cells).done(records) and Schedule(cells).ready(records) == []


def test_a_search_by_gaussian_process_ends_the_same_in_any_order(small_cells):
    _, cells = small_cells(("n_trials: 4", "n_trials: 8, sampler: gp"), ("n_shots: [2, 4]", "n_shots: [2]"))
    schedule = Schedule(cells)
    expected = outcome(schedule, finish(schedule, {}, random.Random(0)))
    records = finish(Schedule(cells), {}, random.Random(1), stop_after=17)  # killed in the round that the model has proposed
    resumed = Schedule(cells)
    finish(resumed, records, random.Random(2))
    assert outcome(resumed, records) == expected and resumed.choices(records)[-1].n_points == 8


@pytest.mark.parametrize("rule", ["median", "asha"])
def test_pruning_gives_up_some_points_and_counts_them(rule):
    cells = searched_cells("random", rule)
    records, _ = undisturbed("random", rule)
    states = Schedule(cells).states(records)
    assert not any(state.n_failed or state.failed for state in states)
    assert any(record.cause is Cause.PRUNED for record in records.values())
    for state in states:
        assert not any(trial.stop_below for point in state.points if point.round == 0 for trial in point.trials)
        dead = [point for point in state.points if any(honest(trial).cause is Cause.PRUNED for trial in point.trials)]
        assert 0 < len(dead) == state.choice.n_pruned_points < state.choice.n_points == 16
        assert dead == [point for point in state.points if point.outcome.pruned]
        assert state.choice.params not in [point.params for point in dead]


def test_a_plan_without_pruning_runs_in_full_what_another_gave_up():
    with_pruning, _ = undisturbed("grid", "median")
    records = dict(with_pruning)
    cells = searched_cells("grid", None)
    again = {trial.digest for trial in Schedule(cells).ready(records)}
    assert again and all(records[digest].cause is Cause.PRUNED for digest in again if digest in records)
    finish(Schedule(cells), records, random.Random(0), run=honest)
    assert outcome(Schedule(cells), records) == undisturbed("grid", None)[1]
    assert all(records[trial.digest].finished for trial in Schedule(cells).known(records))


def shape(states):
    """What a state says, without its objects."""
    return [
        (
            [(point.round, point.params, point.outcome) for point in state.points], state.choice, state.search, state.report,
            state.open, state.n_done, state.n_failed, state.n_search, state.n_report, state.stage,
        )
        for state in states
    ]  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(rng=st.randoms(use_true_random=False), rule=st.sampled_from([None, "asha"]))
def test_a_schedule_that_follows_a_book_says_what_a_new_one_would(rng, rule):
    """Records come, change and go; what was computed before must not show."""
    cells = searched_cells("random", rule)
    complete, _ = undisturbed("random", rule)
    book, schedule, digests = RecordBook(), Schedule(cells), sorted(complete)
    for _ in range(rng.randint(1, 60)):
        digest = rng.choice(digests)
        if book and rng.random() < 0.2:
            del book[rng.choice(sorted(book))]
        elif rng.random() < 0.8:
            for trial in schedule.ready(book)[:3]:
                book[trial.digest] = honest(trial)
        else:
            book[digest] = fake_record(complete[digest].spec, rng.choice([None, Cause.DIVERGED, Cause.PRUNED]))
        if rng.random() < 0.5:
            fresh, records = Schedule(cells), dict(book)
            assert shape(schedule.states(book)) == shape(fresh.states(records)) == shape(schedule.states(book))
            assert schedule.ready(book) == fresh.ready(records)
            running = set(rng.sample(digests, 4))
            following = [trial for trial in fresh.ready(records) if trial.digest not in running]
            assert schedule.next(book, running) == (following[0] if following else None)


def test_only_cells_with_news_are_looked_at_again(small_cells):
    _, cells = small_cells()
    book, schedule = RecordBook(), Schedule(cells)
    before = schedule.states(book)
    trial = next(trial for trial in schedule.ready(book) if trial.spec.method == "lora")
    book[trial.digest] = fake_record(trial.spec)
    after = schedule.states(book)
    assert [new is old for new, old in zip(after, before, strict=True)] == [state.cell is not trial.cell for state in before]


def test_a_trial_that_two_cells_want_runs_once_under_floors_that_both_allow():
    shared = 0
    for seed in range(4):  # in which searches two cells come upon one point hangs on what is drawn
        schedule, records, n_runs = Schedule(searched_cells("tpe", "median", seed)), RecordBook(), 0
        while trial := schedule.next(records, ()):
            asking = [t for state in schedule.states(records) for t in state.open if t.digest == trial.digest]
            assert all(trial.stop_below.get(epoch, -1) <= t.stop_below.get(epoch, -1) for t in asking for epoch in range(12))
            shared += len(asking) > 1
            records[trial.digest] = honest(trial)
            n_runs += 1
        assert n_runs == len(records) == len(schedule.known(records))
    assert shared


def test_many_trials_are_planned_quickly(small_cells):
    import time

    _, cells = small_cells(("seeds: [0, 1, 2]", f"seeds: {list(range(900))}"), ("seeds: [100, 101]", "seeds: [1000]"))
    schedule = Schedule(cells)
    records = finish(schedule, {}, random.Random(4), stop_after=20)
    schedule.ready(records)
    started = time.perf_counter()
    for _ in range(10):
        schedule.ready(records)
    assert (time.perf_counter() - started) / 10 < 0.1
