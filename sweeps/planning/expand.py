"""TODO."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from llmft.config import STREAMS, DataRef, ForgettingSpec, GenerationSpec, ModelRef, TaskRef, TrainSpec, TrialSpec
from llmft.data import Task
from llmft.errors import UserError, error_lines
from llmft.methods import METHODS, Method, check_kinds, complete_settings, method_class
from llmft.tasks import load_task
from sweeps.planning.cells import Cell, check_ranges
from sweeps.planning.resolve import resolve_mixtures, resolve_named, resolve_tasks
from sweeps.planning.schema import MethodEntry, ModelEntry, Plan
from sweeps.planning.search_space import Params, ranges_of, values_of
from sweeps.process import gc_paused


def _train_spec(where: str, values: Params, methods: Mapping[str, str]) -> TrainSpec:
    """A plan's `train`, of all methods or of one entry; `methods` are those that it holds for, by their entries' names."""

    def belongs(_: str, key: str) -> str:
        entries = (name for name, method in methods.items() if key in method_class(method).Settings.model_fields)
        return next((f"methods.{name}.settings" for name in entries), "")

    try:
        return TrainSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(error_lines(error, where, {"": TrainSpec.model_fields}, belongs)) from None


def _generation_spec(where: str, task: Task, values: Params) -> GenerationSpec | None:
    """How a task's texts are generated; None for classification."""
    if (default := task.generation) is None:
        return None
    try:
        return GenerationSpec.model_validate_json(json.dumps({**default.model_dump(), **values}))  # JSON's rules: a list is a tuple
    except ValidationError as error:
        raise UserError(error_lines(error, where, {"": GenerationSpec.model_fields})) from None


def _trial_spec(where: str, **fields: Any) -> TrialSpec:
    try:
        return TrialSpec(**fields)
    except ValidationError as error:
        raise UserError(error_lines(error, where)) from None


def _entry_cells(
    where: str,
    plan: Plan,
    name: str,
    entry: MethodEntry,
    model_entry: ModelEntry,
    model: ModelRef,
    subject: Mapping[str, Any],
    teacher: ModelRef | None,
    mixture: Mapping[str, TaskRef],
) -> list[Cell]:
    """The cells of one method entry; `subject` are the fields of its specs that hold for the whole task."""
    method, task = entry.method or name, load_task(subject["task"], subject.get("definition"))
    try:
        cls = method_class(method)
        settings = complete_settings(method, entry.settings)
        mixes = cls.uses_mixture
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if entry.n_shots and not cls.uses_shots:
        raise UserError(f"{where}.n_shots: the method {method!r} uses no shots; remove the key.")
    mixture = {name: other for name, other in mixture.items() if name != subject["task"]}
    if mixes and not mixture:
        raise UserError(f"{where}.mixture: name tasks to train on, besides {subject['task']!r} itself.")
    if entry.mixture and not mixes:
        raise UserError(f"{where}.mixture: the method {method!r} trains on its own task alone; remove the key.")
    if entry.teacher and not cls.uses_teacher:
        raise UserError(f"{where}.teacher: the method {method!r} learns from no teacher; remove the key.")
    if not cls.trains and (entry.train or entry.search):
        raise UserError(f"{where}: the method {method!r} trains nothing; remove {'train' if entry.train else 'search'}.")
    try:
        check_kinds(method, subject["task"], task.kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _train_spec(f"{where}.train", entry.train, {name: method})
    train = TrainSpec.model_validate({**cls.train_defaults, **plan.train, **entry.train}) if cls.trains else TrainSpec()
    ranges = ranges_of(where, plan, entry, cls, values_of(train, settings).keys()) if cls.trains and plan.search else {}
    generation = _generation_spec(f"{where.split(': ')[0]}: generation", task, plan.generation)
    cells = []
    for n_shots in (entry.n_shots or plan.n_shots) if cls.uses_shots else (0,):
        if cls.uses_shots and n_shots < 1 and not mixes:
            raise UserError(f"{where}: n_shots: must be at least 1 for a method that uses shots (got {n_shots}).")
        base = _trial_spec(
            where, model=model, **subject, method=method, settings=settings, n_shots=n_shots,
            teacher=None if teacher == model else teacher, mixture=mixture,
            shots_unit=plan.shots_unit if n_shots else "total", pattern=entry.pattern or plan.pattern or next(iter(task.patterns)),
            verbalizer=entry.verbalizer or plan.verbalizer, separator=plan.separator,
            instruction=plan.instruction if entry.instruction is None else entry.instruction, draw=plan.draw if n_shots else "balanced",
            demonstrations=plan.demonstrations if n_shots else (), train=train, n_dev=plan.n_dev,
            n_test=plan.n_test, max_length=plan.max_length, precision=plan.precision,
            selections=plan.selections if cls.trains else ("none",), generation=generation,
        )  # fmt: skip
        search_base = base.model_copy(update={"selections": (plan.search_selection,), "test_sets": (), "forgetting": None})
        cell = Cell(
            entry=name, base=base, search_base=search_base, ranges=ranges, search=plan.search if ranges else None,
            report_seeds=_report_seeds(plan, cls, generation), vary=plan.report.vary, model_entry=model_entry,
        )  # fmt: skip
        check_ranges(where, cell)
        cells.append(cell)
    return cells


def build_cells(
    plan: Plan,
    where: str = "plan",
    resolve_model: Callable[[str, str], ModelRef] | None = None,
    resolve_data: Callable[[str, str | None], DataRef] | None = None,
) -> list[Cell]:
    """The plan's cells: models, then tasks, then methods in the plan's order, then shots.

    Args:
        plan: the plan.
        where: the plan's file, for messages.
        resolve_model: name and revision -> the model with its fingerprint; by default llmft's.
        resolve_data: task and folder -> the data with its fingerprint; by default the task's own.

    Raises:
        UserError: a name or value is not known or not allowed, or two entries describe the same cell.
    """
    if resolve_model is None:
        with gc_paused():
            from llmft.models import resolve_model  # imports torch
    methods = {name: entry.method or name for name, entry in plan.methods.items()}
    _train_spec(f"{where}: train", plan.train, {name: method for name, method in methods.items() if method in METHODS})
    resolve_data = resolve_data or resolve_named
    try:
        subjects = resolve_tasks(plan, resolve_data)
        models = [resolve_model(entry.name, entry.revision) for entry in plan.models]
        teachers = {
            name: entry.teacher and resolve_model(entry.teacher.name, entry.teacher.revision) for name, entry in plan.methods.items()
        }
        mixtures = resolve_mixtures(plan, subjects, resolve_data)
        forgetting = _resolve_forgetting(plan)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    kinds = {subject["task"]: load_task(subject["task"], subject.get("definition")).kind for subject in subjects}
    if plan.generation and "generation" not in kinds.values():
        raise UserError(f"{where}: generation: none of the tasks {', '.join(kinds)} generates text; remove the key.")
    cells: dict[str, Cell] = {}
    for model_entry, model in zip(plan.models, models, strict=True):
        for subject in subjects:
            for name, entry in plan.methods.items():
                for cell in _entry_cells(
                    f"{where}: methods.{name}",
                    plan,
                    name,
                    entry,
                    model_entry,
                    model,
                    subject | {"forgetting": forgetting},
                    teachers[name],
                    mixtures[name],
                ):
                    if cell.key in cells:
                        raise UserError(
                            f"{where}: methods.{name} and methods.{cells[cell.key].entry} describe the same trials, whatever each "
                            "searches. Give one of them other settings, or remove it."
                        )
                    cells[cell.key] = cell
    return list(cells.values())


def _report_seeds(plan: Plan, cls: type[Method], generation: GenerationSpec | None) -> tuple[int, ...]:
    """The plan's seeds, or the first alone where nothing that they vary changes the method's answer."""
    changing = set(STREAMS) if cls.trains else {"data", "order"} if cls.uses_shots else set()
    if plan.demonstrations and not cls.trains:
        changing -= {"data"}
    if generation and generation.temperature:
        changing.add("dropout")  # which what is drawn hangs on
    return plan.report.seeds if changing & set(plan.report.vary) else plan.report.seeds[:1]


def _resolve_forgetting(plan: Plan) -> ForgettingSpec | None:
    if plan.forgetting is None:
        return None
    from llmft.trial import resolve_forgetting  # imports torch

    return resolve_forgetting(**dict(plan.forgetting), data_dir=plan.data_dir)
