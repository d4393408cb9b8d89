"""Tables of all methods and all tasks, from the registries: for the terminal, and for the READMEs beside them.

`python -m sweeps.display.catalogue` writes the tables of the READMEs; a test compares them with the registries.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from llmft.data import GenerationTask
from llmft.methods import METHODS, SearchRange, method_class
from llmft.tasks import TASKS, load_task

METHOD_COLUMNS = ("method", "what it does", "trains", "settings", "searched", "source")
TASK_COLUMNS = ("task", "what it is", "labels", "in domain", "out of domain", "patterns", "data")
LLMFT = Path(__file__).parents[2] / "llmft"


def method_rows(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the cells of `METHOD_COLUMNS` for each method."""
    rows: list[tuple[str, ...]] = []
    for name in names:
        cls = method_class(name)
        settings = [f"{key}: {value}" for key, value in cls.Settings().model_dump(mode="json").items()]
        searched = [f"{key}: {range_text(span)}" for key, span in cls.search.items()]
        trains = "yes" if cls.trains else "no"
        rows.append((name, _first_sentence(cls), trains, "\n".join(settings) or "-", "\n".join(searched) or "-", cls.paper or "-"))
    return rows


def task_rows(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the cells of `TASK_COLUMNS` for each task."""
    rows: list[tuple[str, ...]] = []
    for name in names:
        task = load_task(name)
        local = [source.files[0] for source in task.sources if source.hub is None]
        data = f"{', '.join(local)} from a folder" if local else "hub or a folder" if task.needs_data else "built in"
        labels = f"text ({task.metric})" if isinstance(task, GenerationTask) else ", ".join(task.labels)
        out_of_domain, patterns = "\n".join(task.out_of_domain) or "-", "\n".join(task.patterns)
        rows.append((name, _first_sentence(type(task)), labels, task.in_domain, out_of_domain, patterns, data))
    return rows


def range_text(span: SearchRange) -> str:
    """Write a range as `1e-05 to 0.01, log` or `one of 4, 8`."""
    if span.choices:
        return f"one of {', '.join(map(str, span.choices))}"
    return f"{span.low:g} to {span.high:g}{', log' if span.log else ''}{', whole numbers' if span.integer else ''}"


def terminal_table(columns: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 99) -> Table:
    """Return a table for the terminal; its first `n_left` columns are aligned left, the others right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < n_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; the first cell of each row is set as code."""
    lines = [columns, ["---"] * len(columns), *([f"`{name}`", *rest] for name, *rest in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), '<br>') for cell in line)} |" for line in lines)


def description(cls: type) -> str:
    """Return the docstring of the file that defines a method or task."""
    return (sys.modules[cls.__module__].__doc__ or "").strip()


def _first_sentence(cls: type) -> str:
    text = " ".join(description(cls).split())
    return re.sub(r" \([^()]*\d{4}[^()]*\)", "", text).split(". ")[0].rstrip(".")  # without its sources


def readmes() -> dict[Path, str]:
    """Return the path of each README with a table of a registry, and the text that it must have."""
    tables = {"methods": markdown_table(METHOD_COLUMNS, method_rows(METHODS)), "tasks": markdown_table(TASK_COLUMNS, task_rows(TASKS))}
    pages = {}
    for kind, table in tables.items():
        path = LLMFT / kind / "README.md"
        head, mark, rest = re.split(f"(<!-- {kind}: .* -->\n)", path.read_text(encoding="utf-8"), maxsplit=1)
        pages[path] = f"{head}{mark}{table}\n{rest[rest.index(f'<!-- end of {kind} -->') :]}"
    return pages


if __name__ == "__main__":
    for path, text in readmes().items():
        path.write_text(text, encoding="utf-8")
