"""The commands of `llmft`, the entry point, exit codes and one-line messages for user errors."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer

from llmft import __version__
from llmft.errors import UserError
from sweeps.cli.lists import methods, tasks
from sweeps.cli.options import MISTAKE, STOPPED, Stopped
from sweeps.cli.plans import fetch, plan, sweep
from sweeps.cli.results import compare, report
from sweeps.cli.trials import evaluate, export, trial
from sweeps.process import install_sigterm_handler, own_this_process

# click's class or typer's own, depending on typer's version
_UsageError: Any = next(cls for cls in reversed(typer.BadParameter.__mro__) if hasattr(cls, "format_message"))

app = typer.Typer(
    name="llmft",
    help="Which way of adapting this language model to this task is best, in and out of domain, and how sure is that?",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
for command in (sweep, plan, fetch, trial, report, compare, export, evaluate, methods, tasks):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False) -> None:
    if version:
        print(f"llmft {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit. Exit codes: 0 success, 1 a trial failed, 2 a user error (one line), 130 stopped."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not sys.stderr.isatty():
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # which would fill a log
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a kernel that nobody asked for
    install_sigterm_handler()
    own_this_process()
    code = _run(sys.argv[1:] if arguments is None else arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # nothing is left to clean up
    gc.freeze()  # a last collection would take up to two seconds
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        command: Any = typer.main.get_command(app)
        code = command(arguments, prog_name="llmft", standalone_mode=False) or 0
    except Stopped as stopped:
        print(f"\nllmft: {stopped}", file=sys.stderr)
        return STOPPED
    except UserError as error:
        print(f"llmft: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except _UsageError as error:
        message = " ".join(error.format_message().split()).replace("Input should be", "must be").rstrip(".")
        print(f"llmft: {message}. See {error.ctx.command_path if error.ctx else 'llmft'} --help.", file=sys.stderr)
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    if code == STOPPED:  # which is also what typer makes of a KeyboardInterrupt
        print("\nllmft: stopped.", file=sys.stderr)
    return code
