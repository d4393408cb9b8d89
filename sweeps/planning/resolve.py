"""Resolve the tasks of a plan: those that come with llmft, and the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmft.config import CustomTask, DataRef, TaskRef
from llmft.data import Task
from llmft.errors import UserError, unknown_name
from llmft.tasks import TASKS, load_task
from sweeps.planning.schema import Plan


@dataclass(frozen=True)
class ResolvedTask:
    """A task of a plan, with its data and the test sets that are scored (None: all)."""

    name: str
    task: Task
    definition: CustomTask | None
    data: DataRef
    test_sets: tuple[str, ...] | None


def resolve_named(task: str, directory: str | None) -> DataRef:
    """Resolve the data of a task that comes with llmft, from a folder or the hub."""
    return load_task(task).resolve_data(directory)


def resolve_tasks(plan: Plan, resolve_data: Callable[[str, str | None], DataRef]) -> list[ResolvedTask]:
    """Resolve each task of the plan.

    Raises:
        UserError: a task or test set is not known, or its rows cannot be had or are not as they should be.
    """
    tasks: list[ResolvedTask] = []
    known: list[str] = []
    for name, entry in zip(plan.task_names, plan.tasks, strict=True):
        definition, data = _own(entry) if isinstance(entry, CustomTask) else (None, resolve_data(name, plan.data_dir))
        task = load_task(name, definition)
        sets = (task.in_domain, *task.out_of_domain)
        chosen = None if plan.test_sets is None else tuple(test_set for test_set in plan.test_sets if test_set in sets)
        if plan.test_sets and not chosen:
            raise unknown_name("test set", plan.test_sets[0], sets, f"test_sets: none is of the task '{name}'")
        tasks.append(ResolvedTask(name, task, definition, data, chosen))
        known += sets
    for name in plan.test_sets or ():
        if name not in known:
            raise unknown_name("test set", name, dict.fromkeys(known), "test_sets")
    return tasks


def resolve_mixtures(
    plan: Plan, tasks: Iterable[ResolvedTask], resolve_data: Callable[[str, str | None], DataRef]
) -> dict[str, dict[str, TaskRef]]:
    """Resolve for each method entry of the plan the tasks that it mixes: of llmft, or the user's own that stand in the plan.

    Raises:
        UserError: a task is not known or named twice, or its rows cannot be had.
    """
    known = {task.name: TaskRef(data=task.data, definition=task.definition) for task in tasks}
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
    """Complete a task of the user's own and resolve its data; every row is checked."""
    from llmft.data import TableTask, complete
    from llmft.tasks import load_data  # imports torch

    try:
        data = TableTask(entry).resolve_data()
        definition = complete(entry, data)
        load_data(entry.name, data, definition)
    except UserError as error:
        raise UserError(f"tasks.{entry.name}: {error}") from None
    return definition, data
