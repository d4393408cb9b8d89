"""Commands for one trial: run it, export what it trained, evaluate it on other tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmft.errors import UserError
from sweeps.cli.options import FAILED, AsJson, DataDir, Device, Digest, RecordFolder, ResultsName, read_folder, terminal


def trial(
    task: Annotated[str | None, typer.Option(help="llmft tasks lists them")] = None,
    method: Annotated[str | None, typer.Option(help="llmft methods lists them")] = None,
    model: Annotated[str | None, typer.Option(help="hub name, folder or 'toy' [default: toy]")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="labelled examples in total [default: 16 where the method uses any]")] = None,
    seed: Annotated[int | None, typer.Option(help="draws the examples, their order, new weights and the dropout [default: 0]")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate [default: the method's]")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the shots [default: 40]")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any other key of a plan: settings.r=16, train.batch_size=8, n_dev=32, ..."),
    ] = None,
    spec: Annotated[
        str | None, typer.Option(metavar="FILE", help="a plan that the trial is a cell of, or a trial's record.json, to run it again")
    ] = None,
    data_dir: DataDir = None,
    device: Device = None,
    out: RecordFolder = None,
    as_json: AsJson = False,
) -> int:
    """Run one trial and print its record."""
    from sweeps.cli.single_trial import TrialOptions, describe_trial, run_one

    options = TrialOptions(task, method, model, shots, seed, lr, epochs, data_dir, assignments or (), spec)
    trial_spec, keep_weights = describe_trial(options)
    if keep_weights and out is None:
        raise UserError("keep_weights needs a folder to keep them in: give --out.")
    watched = sys.stderr.isatty() and not as_json
    record = run_one(trial_spec, device, out, keep_weights=keep_weights, report=_print_progress if watched else None)
    if as_json:
        print(record.model_dump_json(indent=1))
    else:
        from sweeps.display import record_summary

        terminal().print(record_summary(record))
    return 0 if record.finished else FAILED


def _print_progress(progress: dict[str, Any]) -> None:
    """Print one line for each evaluation on dev."""
    dev = "" if progress["dev_score"] is None else f", dev score {progress['dev_score']:.1%}"
    print(f"epoch {progress['epoch']}: training loss {progress['train_loss']:.4f}{dev}", file=sys.stderr)


def export(
    results: ResultsName,
    digest: Digest,
    folder: Annotated[Path, typer.Argument(help="where to write; must be empty or not there")],
    merge: Annotated[bool, typer.Option("--merge", help="a whole model for transformers, in place of an adapter for peft")] = False,
) -> int:
    """Write what a trial has trained for peft or transformers. Its plan says keep_weights: true."""
    from sweeps.cli.export_trial import export_trial

    print(export_trial(results, digest, folder, merge))
    return 0


def evaluate(
    results: ResultsName,
    digest: Digest,
    harness: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="tasks or groups of lm-evaluation-harness: mmlu,bbh,super-glue-lm-eval-v1"),
    ] = None,
    harness_dir: Annotated[str | None, typer.Option(help="a folder with further tasks in the harness's format (YAML)")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="tasks of llmft, zero-shot on their in-domain set")] = None,
    text: Annotated[str | None, typer.Option(help="a text file whose perplexity is measured")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each task [default: all]")] = None,
    before: Annotated[bool, typer.Option("--before", help="measure the base model too")] = False,
    data_dir: DataDir = None,
    device: Device = None,
    as_json: AsJson = False,
) -> int:
    """Ask a trial's adapted model what else it can do.

    Its weights are those that a plan with keep_weights: true has kept. The numbers go into evaluation.json beside the trial's record;
    those of earlier calls stay, unless measured again.
    """
    from sweeps.cli.evaluate_trial import evaluate_trial
    from sweeps.display import changes_table
    from sweeps.planning import ForgettingPlan

    wanted = ForgettingPlan(tasks=_names(tasks), harness=_names(harness), harness_dir=harness_dir, text=text, limit=limit)
    evaluation = evaluate_trial(read_folder(results), digest, wanted, before=before, data_dir=data_dir, device=device)
    if as_json:
        print(evaluation.model_dump_json(indent=1))
    else:
        terminal().print(changes_table(evaluation.changes))
    return 0


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()
