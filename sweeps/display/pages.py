"""One method or one task in the terminal: its description, and its settings or its data and patterns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmft.config import DataRef, StrictModel, TrainSpec
from llmft.data import Example, Source, Task, TaskData
from llmft.errors import UserError
from llmft.methods import method_class
from llmft.tasks import load_task
from sweeps.display.catalogue import TASK_COLUMNS, description, range_text, task_rows, terminal_table

FIELD_COLUMNS = ("setting", "default", "allowed", "what it is")
KINDS = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def method_page(name: str) -> Group:
    """Describe one method: its settings, and how it is trained and searched.

    Raises:
        UserError: there is no such method.
    """
    cls = method_class(name)
    searched = "; ".join(f"{key}: {range_text(span)}" for key, span in cls.search.items())
    parts: list[RenderableType] = [description(cls) + "\n", terminal_table(FIELD_COLUMNS, field_rows(cls.Settings)), ""]
    if cls.trains:
        parts += ["of train, in a plan:", terminal_table(FIELD_COLUMNS, field_rows(TrainSpec, cls.train_defaults)), ""]
    return _page(*parts, f"searched: {searched or 'nothing'}", f"source: {cls.paper or '-'}")


def field_rows(schema: type[StrictModel], defaults: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[str, ...]]:
    """Return the cells of `FIELD_COLUMNS` for each field; `defaults` replace those of the schema."""
    values = schema(**defaults).model_dump(mode="json")
    fields = schema.model_json_schema()["properties"]
    return [(name, json.dumps(values[name]), _allowed(field), field.get("description", "")) for name, field in fields.items()]


def _allowed(schema: dict[str, Any]) -> str:
    """Say what a JSON schema allows: 'number > 0', 'one of kaiming, gaussian', 'list or all-linear'."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return schema["const"]
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return f"{KINDS.get(schema['type'], schema['type'])} {bounds}".strip()


def task_page(name: str, directory: str | None = None) -> Group:
    """Describe one task: its files, the numbers of its rows where they are on this machine, and its patterns on an example.

    Fetches nothing.

    Raises:
        UserError: there is no such task, or the folder `directory` does not hold it.
    """
    task = load_task(name)
    parts: list[RenderableType] = [" ".join(description(type(task)).split()) + "\n", terminal_table(TASK_COLUMNS, task_rows([name]))]
    if task.sources:
        parts += ["", _files_table(task)]
    data = _local_data(task, directory)
    if data is None:
        parts.append("\nIts rows are not on this machine: give --data-dir, or fetch a plan with it (llmft fetch).")
        fields = {field: f"<{field}>" for pattern in task.patterns.values() for field in pattern.fields}
        example = Example("", fields, 0) if task.labels else Example("", fields, None, references=("<answer>",))
    else:
        example = data.pool[0]
        parts += [f"\nRows ({data.revision}):", _counts_table(task, data)]
    for pattern_name, pattern in task.patterns.items():
        words = task.verbalizers[pattern.verbalizer] if task.labels else ()
        words_text = f", label words {', '.join(map(repr, words))}" if words else ""
        parts.append(Text(f"\npattern {pattern_name}{words_text}:", style="bold"))
        answer = example.references[0] if example.label is None else words[example.label]
        parts.append(pattern.render_labelled(example.fields, answer))
    return _page(*parts)


def _page(*parts: RenderableType) -> Group:
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))  # Text: brackets are no markup


def _files_table(task: Task) -> Table:
    """List each file's name in a local folder, the columns that it must have, and where it can be obtained."""
    columns = ["file", "columns", "on the hub", "to be had elsewhere"]
    rows = [[source.files[0], source.holds, _hub_text(source), source.obtain] for source in task.sources]
    n_columns = 4 if any(source.obtain for source in task.sources) else 3
    return terminal_table(columns[:n_columns], [row[:n_columns] for row in rows])


def _hub_text(source: Source) -> str:
    if source.hub is None:
        return "-"
    repository, configuration, split, revision = source.hub
    return " ".join(filter(None, (repository, configuration, split, None if revision == "main" else f"({revision})")))


def _local_data(task: Task, directory: str | None) -> TaskData | None:
    """Load the task's rows; None where no folder is given and the hub's cache does not hold them."""
    from llmft.hub import hub_access

    if directory is not None:
        return task.load(task.resolve_data(directory))
    try:
        with hub_access(offline=True):
            return task.load(task.resolve_data(None) if task.needs_data else DataRef())
    except UserError:
        return None


def _counts_table(task: Task, data: TaskData) -> Table:
    sets = {"(training pool)": data.pool, **{test.name: test.examples for test in data.tests}}
    return terminal_table(
        ("set", "rows", *task.labels),
        [
            (name, f"{len(examples):,}", *(f"{sum(example.label == i for example in examples):,}" for i in range(len(task.labels))))
            for name, examples in sets.items()
        ],
    )
