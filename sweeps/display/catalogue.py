"""What methods and tasks there are, from the registry: for the terminal, and as the tables of the READMEs beside them.

`python -m sweeps.display.catalogue` writes those tables anew; a test holds them against the registry.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmft.config import DataRef, StrictModel, TrainSpec
from llmft.data import Example, Source, Task, TaskData
from llmft.errors import UserError
from llmft.methods import METHODS, method_class
from llmft.tasks import TASKS, load_task
from sweeps.display.tables import range_text

METHOD_COLUMNS = ("method", "what it does", "trains", "settings", "searched", "source")
TASK_COLUMNS = ("task", "what it is", "labels", "in domain", "out of domain", "patterns", "data")
FOLDER = Path(__file__).parents[2] / "llmft"


def method_rows(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Of each method the cells of `METHOD_COLUMNS`."""
    rows = []
    for name in names:
        cls = method_class(name)
        settings = cls.Settings().model_dump(mode="json")
        rows.append(
            (
                name,
                _first_sentence(cls),
                "yes" if cls.trains else "no",
                "\n".join(f"{key}: {value}" for key, value in settings.items()) or "-",
                "\n".join(f"{key}: {range_text(span)}" for key, span in cls.search.items()) or "-",
                cls.paper or "-",
            )
        )
    return rows


def task_rows(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Of each task the cells of `TASK_COLUMNS`."""
    rows = []
    for name in names:
        task = load_task(name)
        here = [source.files[0] for source in task.sources if source.hub is None]
        data = f"{', '.join(here)} from a folder" if here else "hub or a folder" if task.needs_data else "built in"
        rows.append(
            (
                name, _first_sentence(type(task)), ", ".join(task.labels) or f"text ({task.metric})", task.in_domain, "\n".join(task.out_of_domain) or "-",
                "\n".join(task.patterns), data,
            )
        )  # fmt: skip
    return rows


def terminal_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([f"`{name}`", *rest] for name, *rest in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), '<br>') for cell in line)} |" for line in lines)


def task_page(name: str, directory: str | None = None) -> Group:
    """One task: what it is, its rows where they are on this machine, and its patterns on an example. Fetches nothing.

    Raises:
        UserError: there is no such task, or the folder does not hold it.
    """
    task = load_task(name)
    parts = [Text(" ".join(description(type(task)).split()) + "\n"), terminal_table(TASK_COLUMNS, task_rows([name]))]
    if task.sources:
        parts += [Text(), _files_table(task.sources)]
    data = _data_here(task, directory)
    if data is None:
        parts.append(Text("\nIts rows are not on this machine: give --data-dir, or fetch a plan with it (llmft fetch)."))
        fields = {field: f"<{field}>" for pattern in task.patterns.values() for field in pattern.fields}
        example = Example("", fields, 0) if task.labels else Example("", fields, None, references=("<answer>",))
    else:
        example = data.pool[0]
        parts += [Text(f"\nRows ({data.revision}):"), terminal_table(("set", "rows", *task.labels), _counts(task, data))]
    for pattern_name, pattern in task.patterns.items():
        words = task.verbalizers[pattern.verbalizer] if task.labels else ()
        named = f", label words {', '.join(map(repr, words))}" if words else ""
        parts.append(Text(f"\npattern {pattern_name}{named}:", style="bold"))
        parts.append(Text(pattern.render_labelled(example.fields, words[example.label] if words else example.references[0])))
    return Group(*parts)


def _files_table(sources: Sequence[Source]) -> Table:
    """Of each file its name in a local folder, what its rows must hold, and where it is to be had."""
    columns = ["file", "columns", "on the hub", "to be had elsewhere"]
    rows = [[each.files[0], each.holds, "-" if each.hub is None else _place(each.hub), each.obtain] for each in sources]
    if not any(each.obtain for each in sources):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return terminal_table(columns, rows)


def _place(hub: tuple[str, str | None, str, str]) -> str:
    repository, configuration, split, revision = hub
    return " ".join(filter(None, (repository, configuration, split, None if revision == "main" else f"({revision})")))


def _data_here(task: Task, directory: str | None) -> TaskData | None:
    """The task's rows; None where neither the folder is given nor the hub's cache holds them."""
    from llmft.hub import hub_access

    if directory is not None:
        return task.load(task.resolve_data(directory))
    try:
        with hub_access(offline=True):
            return task.load(task.resolve_data(None) if task.needs_data else DataRef())
    except UserError:
        return None


def _counts(task: Task, data: TaskData) -> list[tuple[str, ...]]:
    sets = {"(training pool)": data.pool, **{test.name: test.examples for test in data.tests}}
    return [
        (name, f"{len(examples):,}", *(f"{sum(example.label == i for example in examples):,}" for i in range(len(task.labels))))
        for name, examples in sets.items()
    ]


def description(cls: type) -> str:
    return (sys.modules[cls.__module__].__doc__ or "").strip()


def _first_sentence(cls: type) -> str:
    text = " ".join(description(cls).split())
    return re.sub(r" \([^()]*\d{4}[^()]*\)", "", text).split(". ")[0].rstrip(".")  # without its sources


def readmes() -> dict[Path, str]:
    """Each README with a table of the registry, and what it must say."""
    tables = {
        FOLDER / "methods" / "README.md": ("methods", markdown_table(METHOD_COLUMNS, method_rows(METHODS))),
        FOLDER / "tasks" / "README.md": ("tasks", markdown_table(TASK_COLUMNS, task_rows(TASKS))),
    }
    return {path: _with_table(path.read_text(encoding="utf-8"), kind, table) for path, (kind, table) in tables.items()}


def _with_table(page: str, kind: str, table: str) -> str:
    marks = re.compile(f"(<!-- {kind}: [^\\n]* -->\\n).*(<!-- end of {kind} -->)", re.DOTALL)
    return marks.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


if __name__ == "__main__":
    for path, text in readmes().items():
        path.write_text(text, encoding="utf-8")

FIELD_COLUMNS = ("setting", "default", "allowed", "what it is")
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def method_page(name: str) -> Group:
    """One method: what it is, its settings, and how it is trained and searched.

    Raises:
        UserError: there is no such method.
    """
    cls = method_class(name)
    searched = "; ".join(f"{key}: {range_text(span)}" for key, span in cls.search.items())
    parts = [Text(description(cls) + "\n"), terminal_table(FIELD_COLUMNS, field_rows(cls.Settings)), Text()]
    if cls.trains:
        parts += [Text("of train, in a plan:"), terminal_table(FIELD_COLUMNS, field_rows(TrainSpec, cls.train_defaults)), Text()]
    return Group(*parts, Text(f"searched: {searched or 'nothing'}"), Text(f"source: {cls.paper or '-'}"))


def field_rows(spec: type[StrictModel], defaults: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[str, ...]]:
    """Of each field the cells of `FIELD_COLUMNS`; `defaults` go before its own."""
    values = spec(**defaults).model_dump(mode="json")
    fields = spec.model_json_schema()["properties"]
    return [(name, json.dumps(values[name]), _allowed(field), field.get("description", "")) for name, field in fields.items()]


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema lets through: 'number > 0', 'one of kaiming, gaussian', 'list or all-linear'."""
    if "anyOf" in schema:
        return " or ".join(_allowed(each) for each in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return schema["const"]
    kinds = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return f"{kinds.get(schema['type'], schema['type'])} {bounds}".strip()
