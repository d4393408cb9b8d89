"""The folder is the registry: every file in `methods/` whose name has no leading underscore is one method, under the name of the file.

The names are known without importing anything; a file is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmft.config import TrainSpec
from llmft.errors import UserError, error_lines, unknown_name

if TYPE_CHECKING:
    from llmft.methods._base import Method


METHODS: tuple[str, ...] = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def method_class(name: str) -> type[Method]:
    """The class of the method `name`.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return importlib.import_module(f"llmft.methods.{name}").METHOD


def build_method(name: str, settings: dict) -> Method:
    """The method `name` with its settings; what is not given takes the method's default.

    Raises:
        UserError: there is no such method or setting, or a value is not allowed.
    """
    cls = method_class(name)
    try:
        return cls(cls.Settings.model_validate_json(json.dumps(settings)))  # JSON's rules: a list is a tuple
    except ValidationError as error:
        known = {"": cls.Settings.model_fields}
        raise UserError(
            error_lines(error, f"method '{name}'", known, lambda _, key: "train" if key in TrainSpec.model_fields else "")
        ) from None


def complete_settings(name: str, settings: dict) -> dict:
    """`settings` with the method's defaults filled in, as a trial's spec holds them."""
    return build_method(name, settings).settings.model_dump(mode="json")


def check_kinds(method: str, task: str, kind: str) -> None:
    """Whether the method `method` serves the task `task`, of which the answers are of `kind`.

    Raises:
        UserError: it does not, or there is no such method.
    """
    serves = method_class(method).kinds
    if kind not in serves:
        others = ", ".join(name for name in METHODS if kind in method_class(name).kinds)
        raise UserError(f"method '{method}' is for {' and '.join(serves)}, and the task '{task}' for {kind}. Methods for {kind}: {others}.")
