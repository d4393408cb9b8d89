"""The tasks of a plan, found and checked: those that come with llmft, and the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmft.config import CustomTask, DataRef, TaskRef
from llmft.errors import UserError, unknown_name
from llmft.tasks import TASKS, load_task
from sweeps.planning.schema import Plan


def resolve_named(task: str, directory: str | None) -> DataRef:
    """The data of a task that comes with llmft, from a folder or the hub."""
    return load_task(task).resolve_data(directory)


def resolve_tasks(plan: Plan, resolve_data: Callable[[str, str | None], DataRef]) -> list[dict[str, Any]]:
    """For each task of the plan the fields of its specs: task, definition, data and test_sets.

    Raises:
        UserError: a task or test set is not known, or its rows cannot be had or are not as they should be.
    """
    subjects, known = [], {}
    for name, entry in zip(plan.task_names, plan.tasks, strict=True):
        definition, data = _own(entry) if isinstance(entry, CustomTask) else (None, resolve_data(name, plan.data_dir))
        task = load_task(name, definition)
        sets = (task.in_domain, *task.out_of_domain)
        chosen = None if plan.test_sets is None else tuple(one for one in plan.test_sets if one in sets)
        if chosen == ():
            raise unknown_name("test set", plan.test_sets[0], sets, f"test_sets: none is of the task '{name}'")
        subjects.append({"task": name, "definition": definition, "data": data, "test_sets": chosen})
        known |= dict.fromkeys(sets)
    for name in plan.test_sets or ():
        if name not in known:
            raise unknown_name("test set", name, known, "test_sets")
    return subjects


def resolve_mixtures(
    plan: Plan, subjects: Iterable[dict[str, Any]], resolve_data: Callable[[str, str | None], DataRef]
) -> dict[str, dict[str, TaskRef]]:
    """For each method entry of the plan the tasks that it mixes: of llmft, or the user's own that stand in the plan.

    Args:
        subjects: from `resolve_tasks`.

    Raises:
        UserError: a task is not known or named twice, or its rows cannot be had.
    """
    known = {one["task"]: TaskRef(data=one["data"], definition=one["definition"]) for one in subjects}
    mixtures: dict[str, dict[str, TaskRef]] = {}
    for name, entry in plan.methods.items():
        mixture = mixtures[name] = {}
        for task in entry.mixture:
            if task in mixture:
                raise UserError(f"methods.{name}.mixture: names {task!r} twice.")
            if task not in known:
                if task not in TASKS:
                    raise unknown_name("task", task, dict.fromkeys((*TASKS, *known)), f"methods.{name}.mixture")
                known[task] = TaskRef(data=resolve_data(task, plan.data_dir))
            mixture[task] = known[task]
    return mixtures


def _own(entry: CustomTask) -> tuple[CustomTask, DataRef]:
    """A task of the user's own, complete, and its data; every row is looked at."""
    from llmft.data import TableTask, complete
    from llmft.tasks import load_data  # imports torch

    try:
        data = TableTask(entry).resolve_data()
        definition = complete(entry, data)
        load_data(entry.name, data, definition)
    except UserError as error:
        raise UserError(f"tasks.{entry.name}: {error}") from None
    return definition, data
