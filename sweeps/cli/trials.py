"""What concerns one trial: run it, export what it trained, evaluate it elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmft.errors import UserError
from llmft.records import open_folder
from sweeps.cli.options import FAILED, DataDir, Device, Folder, terminal


def trial(
    task: Annotated[str, typer.Option(help="llmft tasks lists them")],
    method: Annotated[str, typer.Option(help="llmft methods lists them")],
    model: Annotated[str, typer.Option(help="hub name, folder or 'toy'")] = "toy",
    revision: Annotated[str, typer.Option(help="branch, tag or commit of a hub model")] = "main",
    teacher: Annotated[str | None, typer.Option(help="which model a distilled one learns from [default: itself]")] = None,
    mixture: Annotated[list[str] | None, typer.Option(metavar="TASK", help="another task to train on; once for each")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="labelled examples in total [default: 16 where the method uses any]")] = None,
    seed: Annotated[int, typer.Option(help="draws the examples, their order, new weights and the dropout")] = 0,
    lr: Annotated[float | None, typer.Option(help="learning rate [default: the method's]")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the shots [default: 40]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per optimiser step [default: 32]")] = None,
    pattern: Annotated[str, typer.Option(help="how a prompt is written; llmft tasks NAME shows the task's")] = "minimal",
    verbalizer: Annotated[str, typer.Option(help="the label words [default: the pattern's]", show_default=False)] = "default",
    n_dev: Annotated[int, typer.Option(help="examples that select the checkpoint")] = 64,
    n_test: Annotated[int | None, typer.Option(help="rows of each test set [default: all]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a prompt [default: the model's context]")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or (on CUDA) fp16")] = "fp32",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a setting of the method, its training or the generation, or plan.KEY"),
    ] = None,
    data_dir: DataDir = None,
    device: Device = None,
    out: Annotated[
        Folder, typer.Option(parser=open_folder, metavar="FOLDER", help="keep the record in this folder, or URL, of results")
    ] = None,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="keep what is trained in --out too, for llmft export")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole record")] = False,
) -> int:
    """Run one trial and print its record."""
    from sweeps.cli.single_trial import run_one, trial_plan

    if keep_weights and out is None:
        raise UserError("--keep-weights needs a folder to keep them in: give --out.")
    short = {"learning_rate": lr, "epochs": epochs, "batch_size": batch_size}
    content = trial_plan(
        method, assignments or [], {name: value for name, value in short.items() if value is not None}, n_shots=shots, task=task,
        model=model, revision=revision, pattern=pattern, verbalizer=verbalizer, n_dev=n_dev, n_test=n_test, max_length=max_length,
        precision=precision, data_dir=data_dir, keep_weights=keep_weights, teacher=teacher, mixture=mixture or (),
    )  # fmt: skip
    watched = sys.stderr.isatty() and not as_json
    record = run_one(content, seed, device, out, _say_progress if watched else None)
    if as_json:
        print(record.model_dump_json(indent=1))
    else:
        from sweeps.display import record_summary

        terminal().print(record_summary(record))
    return 0 if record.finished else FAILED


def _say_progress(progress: dict[str, Any]) -> None:
    """One line for each look at dev."""
    dev = "" if progress["dev_score"] is None else f", dev score {progress['dev_score']:.1%}"
    print(f"epoch {progress['epoch']}: training loss {progress['train_loss']:.4f}{dev}", file=sys.stderr)


def export(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    digest: Annotated[str, typer.Argument(help="the trial: the name of its folder in trials/, or how that begins")],
    folder: Annotated[Path, typer.Argument(help="where to write; must be empty or not there")],
    merge: Annotated[bool, typer.Option("--merge", help="a whole model for transformers, in place of an adapter for peft")] = False,
) -> int:
    """Write what a trial has trained for peft or transformers. Its plan says keep_weights: true."""
    from sweeps.cli.export_trial import export_trial

    print(export_trial(results, digest, folder, merge))
    return 0


def evaluate(
    results: Annotated[str, typer.Argument(help="a folder of results, or its URL")],
    digest: Annotated[str, typer.Argument(help="the trial: its folder's name below trials/, or the beginning of it")],
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
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> int:
    """Ask a trial's adapted model what else it can do.

    Its weights are those that a plan with keep_weights: true has kept. The numbers go into evaluation.json beside the trial's record; those of earlier calls stay, unless measured again.
    """
    from sweeps.cli.evaluate_trial import evaluate_trial
    from sweeps.display import changes_table

    evaluation = evaluate_trial(
        open_folder(results), digest, _names(tasks), _names(harness), harness_dir, text, limit, before, data_dir, device
    )
    if as_json:
        print(evaluation.model_dump_json(indent=1))
    else:
        terminal().print(changes_table(evaluation.changes))
    return 0


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()
