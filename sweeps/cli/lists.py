"""Commands that list the methods and the tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from sweeps.cli.options import DataDir, terminal

Markdown = Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")]


def methods(
    name: Annotated[str | None, typer.Argument(help="one method, with its whole description and its settings")] = None,
    markdown: Markdown = False,
) -> int:
    """The ways of adapting a model."""
    from llmft.methods import METHODS
    from sweeps.display import METHOD_COLUMNS, markdown_table, method_page, method_rows, terminal_table

    if markdown:
        print(markdown_table(METHOD_COLUMNS, method_rows(METHODS if name is None else [name])))
    else:
        page = terminal_table(METHOD_COLUMNS, method_rows(METHODS)) if name is None else method_page(name)
        terminal().print(page, highlight=False)
    return 0


def tasks(
    name: Annotated[str | None, typer.Argument(help="one task, with its rows and its patterns on an example")] = None,
    data_dir: DataDir = None,
    markdown: Markdown = False,
) -> int:
    """The tasks, with their test sets and patterns. Fetches nothing."""
    from llmft.tasks import TASKS
    from sweeps.display import TASK_COLUMNS, markdown_table, task_page, task_rows, terminal_table

    if markdown:
        print(markdown_table(TASK_COLUMNS, task_rows(TASKS if name is None else [name])))
    else:
        page = terminal_table(TASK_COLUMNS, task_rows(TASKS)) if name is None else task_page(name, data_dir)
        terminal().print(page, highlight=False)
    return 0
