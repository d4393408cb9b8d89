"""Run a plan: what is missing from the store, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llmft.errors import UserError
from llmft.records import StoragePath
from sweeps.display import Progress
from sweeps.execution import Needs, SweepState, moved_models, tracking
from sweeps.planning import Cell, Plan
from sweeps.process import gc_paused
from sweeps.search import FailurePolicy, Schedule, StudyExporter, failed
from sweeps.store import Store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: its trials by status, how many ran just now, and the cells whose search failed altogether."""

    n_finished: int
    n_failed: int
    n_new: int
    failed_cells: list[Cell] = field(default_factory=list)


def check_cells(cells: list[Cell], where: str, check_spec: Callable[[Any], None] | None = None, here: bool = True) -> None:
    """Check every cell's trials before any starts.

    Args:
        here: whether the trials will run on this machine.

    Raises:
        UserError: as `llmft.trial.run.check_spec`; the line begins with the plan's file, `where`, and the method's entry.
    """
    if check_spec is None:
        with gc_paused():
            from llmft.trial import run as trial

        check_spec = partial(trial.check_spec, here=here)
    for cell in cells:
        try:
            check_spec(cell.base)
            if cell.search:
                check_spec(cell.search_base)
        except UserError as error:
            raise UserError(f"{where}: methods.{cell.entry}: {error}") from None


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs; nothing here changes a result.

    Attributes:
        serial: run one trial after the other in this process, without Ray.
        address: of a running Ray cluster; the results must then lie at a URL or in a folder that all its nodes share. None: Ray on this
            machine.
        workers: trials at a time; None: as many as the CPUs, or the GPUs, hold.
        gpus_per_trial: a share of one GPU or a number of them; None: one, where there is one.
        retry_failed: try diverged and too long trials again as well.
        trackers: names of experiment trackers that log every trial (`sweeps.execution.trackers.TRACKERS`).
        studies: URL of a database for the searches as Optuna studies, in place of a journal among the results.
        verbose: show what Ray and the workers print.
    """

    serial: bool = False
    address: str | None = None
    workers: int | None = None
    gpus_per_trial: float | None = None
    retry_failed: bool = False
    trackers: tuple[str, ...] = ()
    studies: str | None = None
    verbose: bool = False


def run_sweep(
    plan: Plan,
    cells: list[Cell],
    root: StoragePath | str,
    options: SweepOptions = SweepOptions(),
    *,
    policy: FailurePolicy | None = None,
    run_trial: Callable[..., Any] | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Run the trials that the plan asks for and the store lacks. After a kill at any moment, the next call finishes the rest.

    Args:
        cells: the plan's cells (`build_cells`).
        root: the folder of results, or its URL.
        policy: which failures are retried, and how often.
        run_trial: what runs a trial; None: `llmft.trial.run_trial`.
        console: where progress is shown; None: the terminal.

    Raises:
        UserError: the folder cannot be written (or no longer: `StoreUnwritable`), holds a damaged record, or another sweep runs on
            it; a tracker is not installed.
        KeyboardInterrupt: the run was stopped; what had finished is stored.
    """
    store, schedule = Store(root), Schedule(cells)
    policy = replace(policy or FailurePolicy(retry_failed=options.retry_failed), timeout_s=plan.trial_timeout_s)
    with (
        store.locked(),
        Progress(schedule, console=console) as progress,
        tracking(options.trackers, store.root, plan.name, progress.say) as trackers,
    ):
        exporter = StudyExporter(str(store.root), options.studies, progress.say)
        state = SweepState(plan, schedule, store, policy, progress, exporter, trackers)
        exporter.update(schedule.states(state.records))
        _say_what_the_results_hold(state)
        try:
            if not state.done:
                _fetch_missing(state, options)
                if options.serial:
                    _run_serially(state, run_trial)
                else:
                    with gc_paused():
                        from sweeps.ray_backend import run_on_ray
                    run_on_ray(
                        state, address=options.address, workers=options.workers, gpus_per_trial=options.gpus_per_trial,
                        run_trial=run_trial, verbose=options.verbose,
                    )  # fmt: skip
        finally:
            state.write_manifest()
            progress.update(state.records, 0, last=True)
    return _result(state)


def _say_what_the_results_hold(state: SweepState) -> None:
    """Write the plan to the store, and say where its results came from another plan or another commit of a model."""
    if state.store.write_plan(state.plan):
        line = f"{state.store.root} holds results of another plan too: they stay, and those that this plan shares are not run again."
        state.progress.say(line)
    for line in moved_models(state.schedule.cells, state.records.values()):
        state.progress.say(line)
    state.progress.update(state.records, 0)


def _fetch_missing(state: SweepState, options: SweepOptions) -> None:
    """Fetch models and data that are not on this machine; nodes of a cluster fetch for themselves."""
    needs = Needs.of(state.schedule.cells)
    if not options.address and not needs.are_here():
        state.progress.say(f"fetching {needs}; trials start when they are here")
        needs.fetch()


def _result(state: SweepState) -> SweepResult:
    states = state.schedule.states(state.records)
    known = [state.records[trial.digest] for trial in state.schedule.known(state.records)]
    n_failed = sum(map(failed, known))
    return SweepResult(len(known) - n_failed, n_failed, state.n_new, [cell_state.cell for cell_state in states if cell_state.failed])


def _run_serially(state: SweepState, run_trial: Callable[..., Any] | None) -> None:
    """Run one trial after the other in this process."""
    if run_trial is None:
        from llmft import trial as llmft_trial

        run_trial = llmft_trial.run_trial
    from llmft.runtime import Runtime

    while trial := state.next_trial():
        state.progress.update(state.records, 1)
        result = run_trial(trial.spec, Runtime(**state.runtime_settings(trial)))
        state.store.put(result.record, result.predictions, result.weights, result.responses)
        state.ended(result.record)
