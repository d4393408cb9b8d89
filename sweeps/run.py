"""Run a plan: what is missing from the store, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llmft.errors import UserError
from llmft.records import StoragePath
from sweeps.display import Progress
from sweeps.execution import Needs, SweepState, moved_models, tracking
from sweeps.planning import Cell, Plan
from sweeps.process import gc_paused
from sweeps.ray_backend import OwnRay
from sweeps.search import FailurePolicy, Schedule, StudyExporter, failed
from sweeps.store import Store


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: its trials by status, how many ran just now, and the cells whose search failed altogether."""

    n_finished: int
    n_failed: int
    n_new: int
    failed_cells: list[Cell] = field(default_factory=list)


def check_cells(cells: list[Cell], where: str, check_spec: Callable[[Any], None] | None = None, here: bool = True) -> None:
    """Find what would make every trial of a cell fail, before any trial starts.

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


def run_sweep(
    plan: Plan,
    cells: list[Cell],
    root: StoragePath | str,
    *,
    serial: bool = False,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_trial: float | None = None,
    policy: FailurePolicy | None = None,
    trackers: Sequence[str] = (),
    run_trial: Callable[..., Any] | None = None,
    studies: str | None = None,
    console: Any = None,
    own_ray: OwnRay | None = None,
    verbose: bool = False,
) -> SweepResult:
    """Run what the plan asks for and the store lacks. Killed at any moment, the next call finishes the rest.

    Args:
        plan: the plan.
        cells: the plan's cells (`build_cells`).
        root: the folder of results, or its URL.
        serial: one trial after the other in this process, without Ray.
        address: of a running Ray cluster; `root` must then be a URL or a folder that all its nodes share. None: Ray on this machine.
        workers: trials at a time; None: as many as the CPUs, or the GPUs, hold.
        gpus_per_trial: a share of one GPU or a number of them; None: one, where there is one.
        policy: what is tried again.
        trackers: names of experiment trackers that are told of every trial (`sweeps.execution.trackers.TRACKERS`).
        run_trial: what runs a trial, `llmft.trial.run.run_trial` unless a test says otherwise.
        studies: a database for the searches as Optuna studies, in place of a journal in `root` (`sweeps.search.study_mirror.StudyExporter`).
        console: a `rich.console.Console` for the progress.
        own_ray: the Ray on this machine, which may be coming up already; None: one that is there for this call alone.
        verbose: show what Ray and the workers print.

    Raises:
        UserError: the folder cannot be written (or no longer: `StoreUnwritable`), holds a damaged record, or another sweep runs on
            it; a tracker is not installed.
        KeyboardInterrupt: the run was stopped; what had finished is stored.
    """
    store, schedule = Store(root), Schedule(cells)
    policy = replace(policy or FailurePolicy(), timeout_s=plan.trial_timeout_s)
    with (
        store.locked(),
        Progress(schedule, console=console) as progress,
        tracking(trackers, store.root, plan.name, progress.say) as tracked,
    ):
        mirror = StudyExporter(root, studies, progress.say)
        ledger = SweepState(plan, schedule, store, policy, progress, mirror, tracked)
        mirror.update(schedule.states(ledger.records))
        if store.write_plan(plan):
            progress.say(f"{store.root} holds results of another plan too: they stay, and those that this plan shares are not run again.")
        for line in moved_models(cells, ledger.records.values()):
            progress.say(line)
        progress.update(ledger.records, 0)
        try:
            if not ledger.done:
                if not address and not (needs := Needs.of(cells)).are_here():  # nodes of a cluster fetch for themselves
                    progress.say(f"fetching {needs}; trials start when they are here")
                    needs.fetch()
                if serial:
                    _run_serially(ledger, run_trial)
                else:
                    with gc_paused():
                        from sweeps.ray_backend import run_on_ray

                    with nullcontext(own_ray) if own_ray else OwnRay(verbose) as ray_here:
                        run_on_ray(
                            ledger, address=address, workers=workers, gpus_per_trial=gpus_per_trial, run_trial=run_trial,
                            own_ray=ray_here, verbose=verbose,
                        )  # fmt: skip
        finally:
            ledger.write_manifest()
            progress.update(ledger.records, 0, last=True)
    states = schedule.states(ledger.records)
    known = [ledger.records[trial.digest] for trial in schedule.known(ledger.records)]
    n_failed = sum(map(failed, known))
    return SweepResult(len(known) - n_failed, n_failed, ledger.n_new, [state.cell for state in states if state.failed])


def _run_serially(ledger: SweepState, run_trial: Callable[..., Any] | None) -> None:
    if run_trial is None:
        from llmft.trial import run_trial
    from llmft.runtime import Runtime

    while trial := ledger.next_trial():
        ledger.progress.update(ledger.records, 1)
        result = run_trial(trial.spec, Runtime(**ledger.runtime_settings(trial)))
        ledger.store.put(result.record, result.predictions, result.weights, result.responses)
        ledger.ended(result.record)
