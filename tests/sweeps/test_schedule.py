import random

import pytest
from fakes import fake_record

from llmft.errors import Cause
from sweeps.schedule import Schedule


def finish(schedule, records, rng, causes=lambda spec: None, stop_after=None):
    """Run trials in a random order, several at a time, until nothing is left or `stop_after` have ended."""
    running, n = [], 0
    while stop_after is None or n < stop_after:
        ready = [trial for trial in schedule.ready(records) if trial not in running]
        running += rng.sample(ready, min(len(ready), rng.randint(1, 4)))
        if not running:
            break
        trial = running.pop(rng.randrange(len(running)))
        records[trial.digest] = fake_record(trial.spec, causes(trial.spec))
        n += 1
    return records


def outcome(schedule, records):
    return sorted(records), [(choice.cell.key, choice.params, choice.dev_accuracy) for choice in schedule.choices(records)]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_any_interruption_give_the_same_trials(small_cells, seed):
    _, cells = small_cells()
    expected = outcome(Schedule(cells), finish(Schedule(cells), {}, random.Random(0)))
    rng, records = random.Random(seed), {}
    for _ in range(4):  # killed three times: a new schedule knows only the records
        finish(Schedule(cells), records, rng, stop_after=rng.randint(1, 12))
    finish(Schedule(cells), records, rng)
    assert outcome(Schedule(cells), records) == expected
    assert Schedule(cells).done(records) and Schedule(cells).total(records) == len(records)


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
