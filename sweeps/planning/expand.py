"""Expand a plan to its cells: every model on every task with every method and number of shots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmft.config import DataRef, ForgettingSpec, GenerationSpec, ModelRef, TaskRef, TrainSpec, TrialSpec
from llmft.data import Task
from llmft.errors import UserError, error_lines
from llmft.methods import METHODS, Method, check_kinds, complete_settings, method_class
from llmft.seeds import SEED_NAMES
from sweeps.planning.cells import Cell, check_ranges
from sweeps.planning.resolve import ResolvedTask, resolve_mixtures, resolve_named, resolve_tasks
from sweeps.planning.schema import MethodEntry, ModelEntry, Plan
from sweeps.planning.search_space import Params, ranges_of, values_of
from sweeps.process import gc_paused


@dataclass(frozen=True)
class ResolvedMethod:
    """A method entry of a plan; `mixture` are the tasks that it mixes, by name."""

    name: str
    entry: MethodEntry
    teacher: ModelRef | None
    mixture: Mapping[str, TaskRef]

    @property
    def method(self) -> str:
        return self.entry.method or self.name


@dataclass(frozen=True)
class Combination:
    """One value of each axis of a plan but the number of shots. A new axis is a field here and a loop in `build_cells`."""

    model_entry: ModelEntry
    model: ModelRef
    task: ResolvedTask
    method: ResolvedMethod


def build_cells(
    plan: Plan,
    where: str = "plan",
    resolve_model: Callable[[str, str], ModelRef] | None = None,
    resolve_data: Callable[[str, str | None], DataRef] | None = None,
) -> list[Cell]:
    """Build the cells of a plan: models, then tasks, then methods in the plan's order, then shots.

    Args:
        plan: the plan.
        where: the plan's file, for messages.
        resolve_model: name and revision -> the model with its fingerprint; by default llmft's.
        resolve_data: task and folder -> the data with its fingerprint; by default the task's own.

    Raises:
        UserError: a name or value is not known or not allowed, or two entries describe the same cell.
    """
    methods = {name: entry.method or name for name, entry in plan.methods.items()}
    _train_spec(f"{where}: train", plan.train, {name: method for name, method in methods.items() if method in METHODS})
    try:
        combinations = _combinations(plan, resolve_model or _default_resolve_model(), resolve_data or resolve_named)
        forgetting = _resolve_forgetting(plan)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    kinds = {combination.task.name: combination.task.task.kind for combination in combinations}
    if plan.generation and "generation" not in kinds.values():
        raise UserError(f"{where}: generation: none of the tasks {', '.join(kinds)} generates text; remove the key.")
    cells: dict[str, Cell] = {}
    for combination in combinations:
        name = combination.method.name
        for cell in _cells_of(where, plan, combination, forgetting):
            if cell.key in cells:
                raise UserError(
                    f"{where}: methods.{name} and methods.{cells[cell.key].entry} describe the same trials, whatever each "
                    "searches. Give one of them other settings, or remove it."
                )
            cells[cell.key] = cell
    return list(cells.values())


def _combinations(
    plan: Plan, resolve_model: Callable[[str, str], ModelRef], resolve_data: Callable[[str, str | None], DataRef]
) -> list[Combination]:
    tasks = resolve_tasks(plan, resolve_data)
    models = [(entry, resolve_model(entry.name, entry.revision)) for entry in plan.models]
    teachers = {
        name: resolve_model(entry.teacher.name, entry.teacher.revision) if entry.teacher else None for name, entry in plan.methods.items()
    }
    mixtures = resolve_mixtures(plan, tasks, resolve_data)
    methods = [ResolvedMethod(name, entry, teachers[name], mixtures[name]) for name, entry in plan.methods.items()]
    return [Combination(entry, model, task, method) for entry, model in models for task in tasks for method in methods]


def _cells_of(where: str, plan: Plan, combination: Combination, forgetting: ForgettingSpec | None) -> list[Cell]:
    """Build the cells of one combination, one for each number of shots."""
    task, entry, method = combination.task, combination.method.entry, combination.method.method
    where_plan, where = where, f"{where}: methods.{combination.method.name}"
    mixture = {name: other for name, other in combination.method.mixture.items() if name != task.name}
    try:
        cls, settings = method_class(method), complete_settings(method, entry.settings)
        _check_entry(entry, method, task, mixture)
    except UserError as error:
        raise UserError(f"{where}{'' if str(error)[:1] == '.' else ': '}{error}") from None
    _train_spec(f"{where}.train", entry.train, {combination.method.name: method})
    train = TrainSpec.model_validate({**cls.train_defaults, **plan.train, **entry.train}) if cls.trains else TrainSpec()
    ranges = ranges_of(where, plan, entry, cls, values_of(train, settings).keys()) if cls.trains and plan.search else {}
    generation = _generation_spec(f"{where_plan}: generation", task.task, plan.generation)
    cells = []
    for n_shots in (entry.n_shots or plan.n_shots) if cls.uses_shots else (0,):
        if cls.uses_shots and n_shots < 1 and not cls.uses_mixture:
            raise UserError(f"{where}: n_shots: must be at least 1 for a method that uses shots (got {n_shots}).")
        teacher, model = combination.method.teacher, combination.model
        base = _trial_spec(
            where, model=model, task=task.name, definition=task.definition, data=task.data, test_sets=task.test_sets,
            forgetting=forgetting, method=method, settings=settings, n_shots=n_shots,
            teacher=None if teacher == model else teacher, mixture=mixture,
            shots_unit=plan.shots_unit if n_shots else "total", pattern=entry.pattern or plan.pattern or next(iter(task.task.patterns)),
            verbalizer=entry.verbalizer or plan.verbalizer, separator=plan.separator,
            instruction=plan.instruction if entry.instruction is None else entry.instruction, draw=plan.draw if n_shots else "balanced",
            demonstrations=plan.demonstrations if n_shots else (), train=train, n_dev=plan.n_dev,
            n_test=plan.n_test, max_length=plan.max_length, precision=plan.precision,
            selections=plan.selections if cls.trains else ("none",), generation=generation,
        )  # fmt: skip
        search_base = base.model_copy(update={"selections": (plan.search_selection,), "test_sets": (), "forgetting": None})
        cell = Cell(
            entry=combination.method.name, base=base, search_base=search_base, ranges=ranges, search=plan.search if ranges else None,
            report_seeds=_report_seeds(plan, cls, generation), vary=plan.report.vary, model_entry=combination.model_entry,
        )  # fmt: skip
        check_ranges(where, cell)
        cells.append(cell)
    return cells


def _check_entry(entry: MethodEntry, method: str, task: ResolvedTask, mixture: Mapping[str, TaskRef]) -> None:
    """Raise a UserError, beginning with the key if there is one, where a method entry holds what its method does not use."""
    cls = method_class(method)
    if entry.n_shots and not cls.uses_shots:
        raise UserError(f".n_shots: the method {method!r} uses no shots; remove the key.")
    if cls.uses_mixture and not mixture:
        raise UserError(f".mixture: name tasks to train on, besides {task.name!r} itself.")
    if entry.mixture and not cls.uses_mixture:
        raise UserError(f".mixture: the method {method!r} trains on its own task alone; remove the key.")
    if entry.teacher and not cls.uses_teacher:
        raise UserError(f".teacher: the method {method!r} learns from no teacher; remove the key.")
    if not cls.trains and (entry.train or entry.search):
        raise UserError(f"the method {method!r} trains nothing; remove {'train' if entry.train else 'search'}.")
    check_kinds(method, task.name, task.task.kind)


def _train_spec(where: str, values: Params, methods: Mapping[str, str]) -> TrainSpec:
    """Parse `train`, of the plan or of one entry; `methods` are those that it holds for, by the names of their entries."""

    def belongs(_: str, key: str) -> str:
        entries = (name for name, method in methods.items() if key in method_class(method).Settings.model_fields)
        return next((f"methods.{name}.settings" for name in entries), "")

    try:
        return TrainSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(error_lines(error, where, {"": TrainSpec.model_fields}, belongs)) from None


def _generation_spec(where: str, task: Task, values: Params) -> GenerationSpec | None:
    """Complete how the texts of a task are generated; None for classification."""
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


def _report_seeds(plan: Plan, method: type[Method], generation: GenerationSpec | None) -> tuple[int, ...]:
    """Choose the plan's seeds, or the first alone where nothing that they vary changes the method's predictions."""
    changing = set(SEED_NAMES) if method.trains else {"data", "order"} if method.uses_shots else set()
    if plan.demonstrations and not method.trains:
        changing -= {"data"}
    if generation and generation.temperature:
        changing.add("dropout")  # which what is drawn hangs on
    return plan.report.seeds if changing & set(plan.report.vary) else plan.report.seeds[:1]


def _resolve_forgetting(plan: Plan) -> ForgettingSpec | None:
    if plan.forgetting is None:
        return None
    from llmft.trial import resolve_forgetting  # imports torch

    return resolve_forgetting(**dict(plan.forgetting), data_dir=plan.data_dir)


def _default_resolve_model() -> Callable[[str, str], ModelRef]:
    with gc_paused():
        from llmft.models import resolve_model  # imports torch
    return resolve_model
