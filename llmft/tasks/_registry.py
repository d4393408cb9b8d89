"""The folder is the registry: every file in `tasks/` whose name has no leading underscore is one task, under the name of the file.

The names are known without importing anything; a file is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmft.config import CustomTask, DataRef
from llmft.data import Task, TaskData
from llmft.errors import unknown_name

if TYPE_CHECKING:
    from llmft.config import CustomTask
    from llmft.data import Task


TASKS: tuple[str, ...] = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def load_task(name: str, definition: CustomTask | None = None) -> Task:
    """The task `name`, from its file or from the user's own definition.

    Raises:
        UserError: there is no such task.
    """
    if definition is not None:
        from llmft.data import TableTask

        return TableTask(definition)
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return importlib.import_module(f"llmft.tasks.{name}").TASK


@lru_cache(maxsize=16)
def load_data(task: str, data: DataRef, definition: CustomTask | None = None) -> TaskData:
    """A task's rows, kept for the next trial."""
    return load_task(task, definition).load(data)
