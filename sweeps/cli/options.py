"""Options that several commands share, exit codes, and the terminal that commands print to.

Modules of this room import what is heavy inside the command that needs it, so that `llmft --help` takes about 0.1 s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmft.records import StoragePath
    from sweeps.planning import Cell, Plan


FAILED, MISTAKE, STOPPED = 1, 2, 130
"""Exit codes besides 0: a trial failed, a user error, stopped by a signal."""


def read_folder(text: str) -> StoragePath:
    """Parse a folder's path or URL."""
    from llmft.records import open_folder

    return open_folder(text)


PlanName = Annotated[
    str, typer.Argument(help="a plan file, or the name of a plan that comes with llmft: quickstart, rte_hans, paper, ...", metavar="PLAN")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="a local folder with the tasks' files [default: the plan's, else the hub]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="hub name, folder or 'toy', in place of the plan's models; may be repeated")
]
AsJson = Annotated[bool, typer.Option("--json", help="print everything as JSON")]
Rule = Annotated[str, typer.Option(help="which checkpoint counts: best_dev, last, ...; best_on_50: best on 50 out-of-domain examples")]
ResultsName = Annotated[str, typer.Argument(metavar="RESULTS", help="a folder of results, or its URL")]
Digest = Annotated[str, typer.Argument(help="the trial: the name of its folder in trials/, or how that begins")]
Folder = Any  # a Path or a UrlPath: typer takes no union
Results = Annotated[
    Folder,
    typer.Option(
        "--out", parser=read_folder, metavar="FOLDER",
        help="folder or URL (s3://, gs://) of results [default: results/<name of the plan>]",
    ),
]  # fmt: skip
RecordFolder = Annotated[
    Folder, typer.Option("--out", parser=read_folder, metavar="FOLDER", help="keep the record in this folder, or URL, of results")
]


class Stopped(UserError):
    """Ctrl-C or SIGTERM, with a message that says where to go on."""


def terminal() -> Console:
    """Return a console for standard output, 160 columns wide where that is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def load_cells(plan_name: str, models: list[str] | None, data_dir: str | None) -> tuple[Plan, list[Cell], str]:
    """Load a plan and build its cells; the third value is the name of the plan's file, for messages.

    Raises:
        UserError: as `load_plan` and `build_cells` of `sweeps.planning`.
    """
    from sweeps.planning import build_cells, load_plan

    plan, where = load_plan(plan_name, models=tuple(models or ()), data_dir=data_dir)
    return plan, build_cells(plan, where), where


def results_of(plan: Plan, out: StoragePath | None) -> StoragePath:
    """Return the folder of a plan's results: `out` where it is given, else results/NAME."""
    return out or Path("results") / plan.name
