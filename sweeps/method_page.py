"""One method for the terminal: what it is, and each of its settings with what it may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Group
from rich.text import Text

from llmft.registry import method_class
from llmft.spec import Spec, TrainSpec
from sweeps.catalogue import description, terminal_table
from sweeps.views import range_text

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


def field_rows(spec: type[Spec], defaults: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[str, ...]]:
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
