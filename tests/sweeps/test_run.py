from functools import partial

import pytest
from rich.console import Console
from support.fakes import fake_record, fake_trial
from support.runs import executed

from llmft.errors import Cause, UserError
from llmft.trial.result import TrialResult
from sweeps.run import SweepOptions, check_cells, run_sweep
from sweeps.search.retry_policy import FailurePolicy
from sweeps.store.store import Store

QUIET = Console(quiet=True)


@pytest.fixture
def serial(tmp_path, small_cells):
    """Runs the small plan in this process with trials that take no time; gives the outcome and the digests executed."""

    def run(*changes, run_trial=None, policy=None):
        plan, cells = small_cells(*changes)
        log = tmp_path / "log"
        n_before = len(executed(log))
        outcome = run_sweep(
            plan,
            cells,
            tmp_path / "results",
            SweepOptions(serial=True),
            policy=policy,
            console=QUIET,
            run_trial=run_trial or partial(fake_trial, log=str(log)),
        )
        return outcome, executed(log)[n_before:]

    return run


def test_a_finished_plan_runs_nothing_again_and_a_longer_one_the_difference(serial, tmp_path):
    outcome, first = serial()
    assert (outcome.n_finished, outcome.n_failed, outcome.n_new) == (26, 0, 26) and len(set(first)) == 26
    outcome, again = serial()
    assert (outcome.n_finished, outcome.n_new, again) == (26, 0, [])
    outcome, more = serial(("seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]"))
    assert outcome.n_new == len(more) == 3 and not set(more) & set(first)
    assert set(Store(tmp_path / "results").load()) == set(first) | set(more)


def test_what_was_stopped_goes_on(serial, tmp_path):
    def stop_after_five(spec, runtime):
        if len(executed(tmp_path / "log")) == 5:
            raise KeyboardInterrupt
        return fake_trial(spec, runtime, log=str(tmp_path / "log"))

    with pytest.raises(KeyboardInterrupt):
        serial(run_trial=stop_after_five)
    assert (tmp_path / "results" / "sweep.json").exists()
    outcome, rest = serial()
    assert outcome.n_finished == 26 and outcome.n_new == len(rest) == 21


def test_failures_are_rows_and_only_those_that_may_change_run_again(serial, small_cells, tmp_path):
    causes = {0: Cause.DIVERGED, 1: Cause.CRASHED, 2: Cause.QUERY_TOO_LONG}

    def failing(spec, runtime):
        cause = causes.get(spec.data_seed) if spec.method == "in_context" else None
        return TrialResult(fake_record(spec, cause))

    outcome, _ = serial(run_trial=failing)
    assert (outcome.n_finished, outcome.n_failed) == (23, 3)
    outcome, again = serial()
    assert (outcome.n_failed, outcome.n_new) == (2, 1)
    outcome, _ = serial(policy=FailurePolicy(retry_failed=True))
    assert (outcome.n_failed, outcome.n_new) == (0, 2)


def test_a_cell_whose_search_failed_is_said(serial):
    def failing(spec, runtime):
        return TrialResult(fake_record(spec, Cause.DIVERGED if spec.n_shots == 4 else None))

    outcome, _ = serial(run_trial=failing)
    assert [cell.base.n_shots for cell in outcome.failed_cells] == [4] and outcome.n_failed == 8 and outcome.n_finished == 15


def test_a_plan_is_checked_cell_by_cell_before_it_runs(small_cells):
    def refuse(spec):
        if spec.n_shots == 4:
            raise UserError("n_shots: too many.")

    with pytest.raises(UserError, match="plan.yaml: methods.lora: n_shots: too many."):
        check_cells(small_cells()[1], "plan.yaml", refuse)


def test_progress_speaks_in_lines_where_there_is_no_terminal(small_cells, tmp_path):
    import io

    plan, cells = small_cells()
    page = io.StringIO()
    run_sweep(
        plan,
        cells,
        tmp_path / "r",
        SweepOptions(serial=True),
        console=Console(file=page),
        run_trial=partial(fake_trial, log=str(tmp_path / "log")),
    )
    assert "26/26 trials, 4/4 cells, took" in page.getvalue()


def test_time_is_estimated_from_trials_alike(small_cells):
    import random

    from support.schedules import finish

    from sweeps.resources.forecast import remaining_s
    from sweeps.search.schedule import Schedule

    schedule = Schedule(small_cells()[1])
    assert remaining_s(schedule.states({}), {}, 2) is None
    records = finish(schedule, {}, random.Random(0), stop_after=6)
    assert remaining_s(schedule.states(records), records, 2) == pytest.approx(20 * 0.1 / 2)
