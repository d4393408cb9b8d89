"""The commands of `llmft`, one module for each kind. What is heavy is imported inside the command that needs it, so that
`llmft --help` answers at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmft.errors import UserError
from llmft.records import open_folder

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.planning import Cell, Plan


FAILED, MISTAKE, STOPPED = 1, 2, 130
"""Exit codes beside 0: a trial failed, a mistake of the user's, stopped from outside."""

PlanName = Annotated[
    str, typer.Argument(help="a plan file, or the name of a plan that comes with llmft: quickstart, rte_hans, paper, ...", metavar="PLAN")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="a local folder with the tasks' files [default: the plan's, else the hub]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="hub name, folder or 'toy', in place of the plan's models; may be repeated")
]
Folder = Any  # a Path or a UrlPath: typer takes no union
Results = Annotated[
    Folder,
    typer.Option(
        "--out", parser=open_folder, metavar="FOLDER",
        help="folder or URL (s3://, gs://) of results [default: results/<name of the plan>]",
    ),
]  # fmt: skip


class Stopped(UserError):
    """Ctrl-C or SIGTERM, of which there is more to say than that it came."""


def terminal() -> Console:
    """The terminal, or a wide page where the output goes into a file or pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def load_cells(plan_name: str, models: list[str] | None, data_dir: str | None) -> tuple[Plan, list[Cell], str]:
    from sweeps.planning import build_cells, load_plan

    plan, where = load_plan(plan_name, models=tuple(models or ()), data_dir=data_dir)
    return plan, build_cells(plan, where), where
