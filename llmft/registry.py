"""The folder is the registry: every file in `methods/` and `tasks/` is one method or task, under the name of the file.

The names are known without importing anything; a file is imported when it is asked for. A file whose name begins with an underscore
holds what several others share.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmft.errors import UserError, error_lines, unknown_name
from llmft.spec import TrainSpec

if TYPE_CHECKING:
    from llmft.definition import TaskDefinition
    from llmft.method import Method
    from llmft.task import Task


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (Path(__file__).parent / folder).glob("*.py") if not path.stem.startswith("_")))


METHODS: tuple[str, ...] = _names("methods")
TASKS: tuple[str, ...] = _names("tasks")


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


def load_task(name: str, definition: TaskDefinition | None = None) -> Task:
    """The task `name`, from its file or from the user's own definition.

    Raises:
        UserError: there is no such task.
    """
    if definition is not None:
        from llmft.defined import DefinedTask

        return DefinedTask(definition)
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return importlib.import_module(f"llmft.tasks.{name}").TASK


def check_kinds(method: str, task: str, kind: str) -> None:
    """Whether the method `method` serves the task `task`, of which the answers are of `kind`.

    Raises:
        UserError: it does not, or there is no such method.
    """
    serves = method_class(method).kinds
    if kind not in serves:
        others = ", ".join(name for name in METHODS if kind in method_class(name).kinds)
        raise UserError(
            f"method '{method}' is for {' and '.join(serves)}, and the task '{task}' for {kind}. Methods for {kind}: {others}."
        )
