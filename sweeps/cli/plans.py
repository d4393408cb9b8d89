"""Commands that take a plan: run it, preview it, fetch its models and data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmft.errors import UserError
from sweeps.cli.options import FAILED, AsJson, DataDir, Models, PlanName, Results, Stopped, load_cells, results_of, terminal
from sweeps.cli.results import show_report

if TYPE_CHECKING:
    from llmft.records import StoragePath


def sweep(
    plan_name: PlanName,
    out: Results = None,
    serial: Annotated[bool, typer.Option(help="one trial after the other in this process, without Ray")] = False,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster; --out must be a URL or a folder that all its nodes share")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="trials at a time [default: what the CPUs or GPUs hold]")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(min=0, help="GPUs, or a share of one [default: 1 where there is one]")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="try diverged and too long trials again as well")] = False,
    studies: Annotated[
        str | None, typer.Option(help="a database (sqlite:///..., postgresql://...) for the searches as Optuna studies")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="also log every trial to tensorboard, mlflow or wandb; may be repeated")] = None,
    data_dir: DataDir = None,
    models: Models = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show what Ray and the workers print")] = False,
) -> int:
    """Run every trial of a plan that has no result yet, then compare.

    Stopped at any moment, the same command goes on.
    """
    from sweeps.planning import build_cells, load_plan

    if serial and (address or workers):
        raise UserError("--serial runs without Ray: leave out --address and --workers.")
    plan, where = load_plan(plan_name, models=tuple(models or ()), data_dir=data_dir)
    from sweeps.execution import check_trackers  # imports torch, as the others do
    from sweeps.resources import check_gpus, local_machine
    from sweeps.run import SweepOptions, check_cells, run_sweep

    check_trackers(track or ())
    root = results_of(plan, out)
    with _stopped_where(root):
        if address:
            from sweeps.ray_backend import check_answers

            check_answers(address)
        cells = build_cells(plan, where)
        check_cells(cells, where, here=address is None)
        if not (serial or address):
            check_gpus(cells, local_machine(plan.device_memory), gpus_per_trial)
        options = SweepOptions(
            serial=serial, address=address, workers=workers, gpus_per_trial=gpus_per_trial, retry_failed=retry_failed,
            trackers=tuple(track or ()), studies=studies, verbose=verbose,
        )  # fmt: skip
        outcome = run_sweep(plan, cells, root, options)
        for cell in outcome.failed_cells:
            print(f"llmft: {cell}: every trial of the search failed, so nothing is reported.", file=sys.stderr)
        if outcome.n_finished:
            show_report(root)
    print(f"{outcome.n_finished} trials finished, {outcome.n_failed} failed; {outcome.n_new} ran now. Records: {root / 'trials'}")
    return FAILED if outcome.n_failed else 0


@contextmanager
def _stopped_where(root: StoragePath) -> Iterator[None]:
    """Within: a sweep that is stopped says where it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if isinstance(root, Path) and not root.exists():
            raise
        raise Stopped(f"stopped. What has finished lies in {root}; the same command goes on from there.") from None


def plan(
    plan_name: PlanName,
    out: Results = None,
    workers: Annotated[int | None, typer.Option(min=1, help="trials at a time at the most")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(min=0, help="GPUs, or a share of one [default: what its memory takes]")] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of each GPU, for a machine elsewhere or a GPU shared with others")
    ] = None,
    data_dir: DataDir = None,
    models: Models = None,
    as_json: AsJson = False,
) -> int:
    """Show what a plan would run, and what it would take.

    Fetches what that hangs on (tokenizers, rows) where it is not here, and starts nothing.
    """
    from sweeps.display import count_by_stage, preview_page
    from sweeps.resources import local_machine, preview_plan
    from sweeps.run import check_cells
    from sweeps.search import Schedule
    from sweeps.store import Store

    the_plan, cells, where = load_cells(plan_name, models, data_dir)
    check_cells(cells, where, here=not (device_memory or the_plan.device_memory))
    store = Store(results_of(the_plan, out))
    records, machine = store.load(), local_machine(device_memory or the_plan.device_memory)
    preview = preview_plan(Schedule(cells), records, machine, gpus_per_trial, workers)
    if as_json:
        stages = count_by_stage(preview.states, records).items()
        trials = {stage: dict(zip(("new", "done", "failed"), counts, strict=True)) for stage, counts in stages}
        print(json.dumps({"plan": the_plan.name, "trials": trials, **preview.as_json()}, indent=1))
        return 0
    terminal().print(preview_page(preview, records), highlight=False)
    print(f"results: {store.root}; nothing was started")
    return 0


def fetch(plan_name: PlanName, data_dir: DataDir = None, models: Models = None) -> int:
    """Fetch a plan's models and data from the hub. It then runs without a network."""
    from sweeps.execution import Needs

    needs = Needs.of(load_cells(plan_name, models, data_dir)[1])
    for model, folder in zip(needs.models, needs.fetch(), strict=True):
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{model.name}, commit {model.revision}: {n_bytes / 2**20:,.0f} MiB in {folder}")
    for task, data, _ in needs.data:
        print(f"{task}: {', '.join(f'{name}, commit {commit}' for name, _, commit in data.commits)}")
    print("everything is here; the plan needs no network" if needs else "the plan needs nothing of the hub")
    return 0
