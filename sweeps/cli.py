"""The command line. Everything heavy is imported inside the command that needs it, so that `llmft --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmft import __version__
from llmft.errors import UserError
from llmft.files import open_folder

if TYPE_CHECKING:
    from rich.console import Console

    from llmft.files import Place
    from sweeps.cells import Cell
    from sweeps.plan import Plan

# click's class or typer's own, depending on typer's version
_UsageError: Any = next(cls for cls in reversed(typer.BadParameter.__mro__) if hasattr(cls, "format_message"))

FAILED, MISTAKE, STOPPED = 1, 2, 130

app = typer.Typer(
    name="llmft",
    help="Which way of adapting this language model to this task is best, in and out of domain, and how sure is that?",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

PlanName = Annotated[
    str, typer.Argument(help="a plan file, or the name of a plan that comes with llmft: quickstart, rte_hans, paper, ...", metavar="PLAN")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="a local folder with the tasks' files, in place of the plan's")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="hub name, folder or 'toy', in place of the plan's models; may be repeated")
]
_Place = Any  # a Path or a UrlPath: typer takes no union
Results = Annotated[
    _Place,
    typer.Option(
        "--out", parser=open_folder, metavar="FOLDER",
        help="folder or URL (s3://, gs://) of results [default: results/<name of the plan>]",
    ),
]  # fmt: skip


def _console() -> Console:
    """The terminal, or a wide page where the output goes into a file or pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def _load(plan_name: str, models: list[str] | None, data_dir: str | None) -> tuple[Plan, list[Cell], str]:
    from sweeps.cells import build_cells
    from sweeps.plan import load_plan

    plan, where = load_plan(plan_name, models=tuple(models or ()), data_dir=data_dir)
    return plan, build_cells(plan, where), where


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False) -> None:
    if version:
        print(f"llmft {__version__}")
        raise typer.Exit


@app.command()
def sweep(
    plan_name: PlanName,
    out: Results = None,
    serial: Annotated[bool, typer.Option(help="one trial after the other in this process, without Ray")] = False,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster; --out must be a URL or a folder that all its nodes share")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="trials at a time [default: what the CPUs or GPUs hold]")] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="GPUs, or a share of one [default: 1 where there is one]")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="try diverged and too long trials again as well")
    ] = False,
    studies: Annotated[
        str | None, typer.Option(help="a database (sqlite:///..., postgresql://...) for the searches as Optuna studies")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="also log every trial to tensorboard, mlflow or wandb; may be repeated")
    ] = None,
    data_dir: DataDir = None,
    models: Models = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show what Ray and the workers print")] = False,
) -> int:
    """Run every trial of a plan that has no result yet, then compare. Stopped at any moment, the same command goes on."""
    from sweeps.failures import FailurePolicy
    from sweeps.run import check_cells, run_sweep
    from sweeps.trackers import check_trackers

    check_trackers(track or ())
    if serial and (address or workers):
        raise UserError("--serial runs without Ray: leave out --address and --workers.")
    plan, cells, where = _load(plan_name, models, data_dir)
    check_cells(cells, where, here=address is None)
    root = out or Path("results") / plan.name
    try:
        outcome = run_sweep(
            plan, cells, root, serial=serial, address=address, workers=workers, gpus_per_trial=gpus_per_trial,
            policy=FailurePolicy(retry_failed=retry_failed), studies=studies, trackers=tuple(track or ()), verbose=verbose,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nllmft: stopped. What has finished lies in {root}; the same command goes on from there.", file=sys.stderr)
        return STOPPED
    for cell in outcome.failed_cells:
        print(f"llmft: {cell}: every trial of the search failed, so nothing is reported.", file=sys.stderr)
    if outcome.n_finished:
        _show_report(root)
    print(
        f"{outcome.n_finished} trials finished, {outcome.n_failed} failed; {outcome.n_new} ran now. Records: {root / 'trials'}"
    )
    return FAILED if outcome.n_failed else 0


def _show_report(root: Place, rule: str = "best_dev") -> None:
    from analysis.findings import cross_findings
    from analysis.headline import headline
    from analysis.manifest import read_manifest
    from analysis.render import to_terminal
    from analysis.report import write_report
    from analysis.sampled import load_for_rule
    from analysis.tables import compare

    frame, unread = load_for_rule(root, rule)
    table = compare(frame, rule)
    console = _console()
    console.print(to_terminal(table, cross_findings(frame, rule, read_manifest(root))))
    for answer in headline(frame, rule):
        console.print(answer.in_domain, answer.out_of_domain, sep="\n", markup=False, highlight=False)
    for problem in unread:
        print(f"llmft: {problem}", file=sys.stderr)
    print(f"Report: {write_report(root, rule=rule, frame=frame)}")


@app.command()
def plan(
    plan_name: PlanName,
    out: Results = None,
    workers: Annotated[int | None, typer.Option(min=1, help="trials at a time at the most")] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(min=0, help="GPUs, or a share of one [default: what its memory takes]")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of each GPU, for a machine elsewhere or a GPU shared with others")
    ] = None,
    data_dir: DataDir = None,
    models: Models = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> int:
    """Show what a plan would run, what of it is done, and what it would take; starts nothing."""
    from sweeps.devices import local_machine
    from sweeps.outlook import look_ahead
    from sweeps.run import check_cells
    from sweeps.schedule import Schedule
    from sweeps.store import Store
    from sweeps.views import count_by_stage, outlook_view, plan_table

    the_plan, cells, where = _load(plan_name, models, data_dir)
    check_cells(cells, where, here=not (device_memory or the_plan.device_memory))
    store = Store(out or Path("results") / the_plan.name)
    records, machine = store.load(), local_machine(device_memory or the_plan.device_memory)
    outlook = look_ahead(Schedule(cells), records, machine, gpus_per_trial, workers)
    stages = count_by_stage(outlook.states, records)
    if as_json:
        trials = {stage: dict(zip(("new", "done", "failed"), counts, strict=True)) for stage, counts in stages.items()}
        print(json.dumps({"plan": the_plan.name, "trials": trials, **outlook.as_json()}, indent=1))
        return 0
    console = _console()
    console.print(plan_table(outlook.states))
    for stage, (n_new, n_done, n_failed) in stages.items():
        print(f"{stage}: {n_new + n_done + n_failed} trials, {n_new} new, {n_done} done, {n_failed} failed")
    if outlook.n_again:
        print(f"{outlook.n_again} of the failed would be tried again")
    n_other, n_outdated = outlook.leftover.n_other, outlook.leftover.n_outdated
    if n_other or n_outdated:
        print(f"also there, and not counted: {n_other} records of other plans, {n_outdated} of an older llmft")
    console.print(outlook_view(outlook), highlight=False)
    print(f"results: {store.root}; nothing was started")
    return 0


@app.command()
def fetch(plan_name: PlanName, data_dir: DataDir = None, models: Models = None) -> int:
    """Fetch a plan's models and data from the hub into this machine's cache. The plan then runs without a network."""
    from sweeps.prefetch import Needs

    needs = Needs.of(_load(plan_name, models, data_dir)[1])
    for model, folder in zip(needs.models, needs.fetch(), strict=True):
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{model.name}, commit {model.revision}: {n_bytes / 2**20:,.0f} MiB in {folder}")
    for task, data, _ in needs.data:
        print(f"{task}: {', '.join(f'{name}, commit {commit}' for name, _, commit in data.commits)}")
    print("everything is here; the plan needs no network" if needs else "the plan needs nothing of the hub")
    return 0


@app.command()
def trial(
    task: Annotated[str, typer.Option(help="llmft tasks lists them")],
    method: Annotated[str, typer.Option(help="llmft methods lists them")],
    model: Annotated[str, typer.Option(help="hub name, folder or 'toy'")] = "toy",
    revision: str = "main",
    teacher: Annotated[str | None, typer.Option(help="which model a distilled one learns from [default: itself]")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="labelled examples in total [default: 16 where the method uses any]")
    ] = None,
    seed: int = 0,
    lr: Annotated[float | None, typer.Option(help="learning rate [default: the method's]")] = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    pattern: str = "minimal",
    verbalizer: str = "default",
    n_dev: int = 64,
    n_test: Annotated[int | None, typer.Option(help="rows of each test set [default: all]")] = None,
    max_length: int | None = None,
    precision: str = "fp32",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a setting of the method, its training or the generation, or plan.KEY"),
    ] = None,
    data_dir: DataDir = None,
    device: str | None = None,
    out: Annotated[
        _Place, typer.Option(parser=open_folder, metavar="FOLDER", help="keep the record in this folder, or URL, of results")
    ] = None,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="keep what is trained in --out too, for llmft export")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole record")] = False,
) -> int:
    """Run one trial and print its record."""
    from sweeps.one_trial import run_one, trial_plan

    if keep_weights and out is None:
        raise UserError("--keep-weights needs a folder to keep them in: give --out.")
    short = {"learning_rate": lr, "epochs": epochs, "batch_size": batch_size}
    content = trial_plan(
        method, assignments or [], {name: value for name, value in short.items() if value is not None}, n_shots=shots, task=task,
        model=model, revision=revision, pattern=pattern, verbalizer=verbalizer, n_dev=n_dev, n_test=n_test, max_length=max_length,
        precision=precision, data_dir=data_dir, keep_weights=keep_weights, teacher=teacher,
    )  # fmt: skip
    record = run_one(content, seed, device, out)
    if as_json:
        print(record.model_dump_json(indent=1))
    else:
        from sweeps.views import record_summary

        _console().print(record_summary(record))
    return 0 if record.finished else FAILED


@app.command()
def report(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    rule: Annotated[
        str, typer.Option(help="which checkpoint counts: best_dev, last, ...; best_on_50: best on 50 out-of-domain examples")
    ] = "best_dev",
) -> int:
    """Compare what lies in a folder of results: the table here, and the report as HTML. Needs neither torch nor Ray."""
    _show_report(open_folder(results), rule)
    return 0


@app.command()
def compare(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    other: Annotated[str, typer.Argument(help="another one, or 'mosbach2023': the published runs of Mosbach et al. 2023")],
    rule: Annotated[str, typer.Option(help="which checkpoint counts: best_dev, last, ...")] = "best_dev",
    other_rule: Annotated[str | None, typer.Option(help="the same for the other [default: --rule, or last]")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV, with everything it knows")] = False,
) -> int:
    """Two sets of results side by side, cell by cell, with the difference and its test. Needs neither torch nor Ray."""
    from analysis.beside import beside, beside_notes, beside_sheet, beside_title
    from analysis.published import SOURCES, load_results
    from analysis.sheets import sheet_to_terminal

    table = beside(load_results(results), load_results(other), rule, other_rule)
    if as_csv:
        print(table.to_csv(index=False), end="")
        return 0
    names = ("ours", other) if other in SOURCES else (results, other)
    console = _console()
    console.print(sheet_to_terminal(beside_sheet(table, *names), beside_title(table, *names)))
    for note in beside_notes(table, *names):
        print(note)
    return 0


@app.command()
def export(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    digest: Annotated[str, typer.Argument(help="the trial: the name of its folder in trials/, or how that begins")],
    folder: Annotated[Path, typer.Argument(help="where to write; must be empty or not there")],
    merge: Annotated[
        bool, typer.Option("--merge", help="a whole model for transformers, in place of an adapter for peft")
    ] = False,
) -> int:
    """Write what a trial has trained so that peft or transformers loads it. Its plan says keep_weights: true."""
    from sweeps.exports import export_trial

    print(export_trial(results, digest, folder, merge))
    return 0


@app.command()
def evaluate(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    digest: Annotated[str, typer.Argument(help="the trial: its folder's name below trials/, or the beginning of it")],
    harness: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="tasks or groups of lm-evaluation-harness: mmlu,bbh,super-glue-lm-eval-v1"),
    ] = None,
    harness_dir: Annotated[str | None, typer.Option(help="a folder with further tasks in the harness's format (YAML)")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="tasks of llmft, zero-shot on their in-domain set")
    ] = None,
    text: Annotated[str | None, typer.Option(help="a text file whose perplexity is measured")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each task [default: all]")] = None,
    before: Annotated[bool, typer.Option("--before", help="measure the base model too")] = False,
    data_dir: DataDir = None,
    device: str | None = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> int:
    """Ask a trial's adapted model what else it can do, from the weights that a plan with keep_weights: true has kept.

    The numbers go into evaluation.json beside the trial's record; those of earlier calls stay, unless measured again.
    """
    from sweeps.evaluate import evaluate_trial
    from sweeps.views import changes_table

    evaluation = evaluate_trial(
        open_folder(results), digest, _names(tasks), _names(harness), harness_dir, text, limit, before, data_dir, device
    )
    if as_json:
        print(evaluation.model_dump_json(indent=1))
    else:
        _console().print(changes_table(evaluation.changes))
    return 0


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


Markdown = Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")]


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method, with its whole description")] = None, markdown: Markdown = False
) -> int:
    """The ways of adapting a model."""
    from llmft.registry import METHODS, method_class
    from sweeps.catalogue import METHOD_COLUMNS, markdown_table, method_rows, terminal_table

    rows = method_rows(METHODS if name is None else [name])
    if markdown:
        print(markdown_table(METHOD_COLUMNS, rows))
        return 0
    if name is not None:
        print(sys.modules[method_class(name).__module__].__doc__)
    _console().print(terminal_table(METHOD_COLUMNS, rows))
    return 0


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="one task, with its rows and its patterns on an example")] = None,
    data_dir: DataDir = None,
    markdown: Markdown = False,
) -> int:
    """The tasks, with their test sets and patterns. Fetches nothing."""
    from llmft.registry import TASKS
    from sweeps.catalogue import TASK_COLUMNS, markdown_table, task_page, task_rows, terminal_table

    if markdown:
        print(markdown_table(TASK_COLUMNS, task_rows(TASKS if name is None else [name])))
    else:
        table = terminal_table(TASK_COLUMNS, task_rows(TASKS)) if name is None else task_page(name, data_dir)
        _console().print(table, highlight=False)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `llmft`. Exit codes: 0 all well, 1 a trial failed, 2 a mistake of the user's (one line), 130 stopped."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        return command(arguments, prog_name="llmft", standalone_mode=False) or 0
    except UserError as error:
        print(f"llmft: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except _UsageError as error:
        print(f"llmft: {' '.join(error.format_message().split())} See llmft --help.", file=sys.stderr)
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        print("llmft: stopped.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    main()
