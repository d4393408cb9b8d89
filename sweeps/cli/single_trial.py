"""One trial from the command line: a plan with a single cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import yaml

from llmft.config import GenerationSpec, TrainSpec, TrialSpec
from llmft.errors import UserError, unknown_name
from llmft.methods import method_class
from llmft.records import StoragePath, TrialRecord
from llmft.tasks import load_task
from sweeps.planning import Plan, build_cells, parse_plan, read_value
from sweeps.process import gc_paused
from sweeps.store import Store

WHERE = "trial"
PLAN_KEYS = {*(Plan.model_fields.keys() & TrialSpec.model_fields.keys()), "report"}
"""Keys of a plan that describe each of its trials; of `report` what its seeds vary."""


def trial_plan(
    method: str,
    assignments: list[str],
    train: dict[str, Any],
    *,
    n_shots: int | None,
    task: str,
    teacher: str | None = None,
    mixture: Sequence[str] = (),
    **fields: Any,
) -> dict[str, Any]:
    """The plan, as a mapping, of which the trial is the only cell.

    Args:
        method: name of the method.
        assignments: `key=value`, each a setting of the method or a field of `TrainSpec` or, where the task generates text, of
            `GenerationSpec`, or with `plan.` before it one of `PLAN_KEYS` (`plan.shots_unit=per_class`); values are read as YAML.
        train: fields of `TrainSpec` that have an option of their own.
        n_shots: None takes 16 where the method uses shots.
        teacher: a model to learn from.
        mixture: tasks to train on.
        fields: `model`, `revision` and further keys of a plan.

    Raises:
        UserError: no such method or key, or not `key=value`.
    """
    settings, train, generation = {}, dict(train), {}
    fields_of = [(method_class(method).Settings, settings), (TrainSpec, train)]
    fields_of += [(GenerationSpec, generation)] if load_task(task).kind == "generation" else []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set: write key=value (got {text!r}).")
        values, name = next((values for spec, values in fields_of if key in spec.model_fields), None), key
        if values is None and key.startswith("plan.") and key.removeprefix("plan.") in PLAN_KEYS:
            values, name = fields, key.removeprefix("plan.")
        if values is None:
            known = {name for spec, _ in fields_of for name in spec.model_fields} | {f"plan.{name}" for name in PLAN_KEYS}
            raise unknown_name("setting", key, known, f"--set, method '{method}'")
        values[name] = _value(text, value)
    entry = {"settings": settings, "train": train, "teacher": teacher, "mixture": mixture}
    entry |= {} if n_shots is None else {"n_shots": [n_shots]}
    models = [{"name": fields.pop("model"), "revision": fields.pop("revision")}]
    return {"name": "trial", "models": models, "tasks": [task], "methods": {method: entry}, "generation": generation, **fields}


def _value(text: str, value: str) -> Any:
    try:
        return read_value(value)
    except yaml.YAMLError:
        raise UserError(f"--set: the value is not readable as YAML (got {text!r}).") from None


def trial_spec(plan: Plan, seed: int) -> TrialSpec:
    """The only cell's trial with this seed.

    Raises:
        UserError: a name or value is not known or not allowed.
    """
    (cell,) = build_cells(plan, WHERE)
    return cell.report_spec({}, seed)


def run_one(
    content: dict[str, Any],
    seed: int,
    device: str | None,
    root: StoragePath | str | None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> TrialRecord:
    """Run the trial, or read its record where `root` holds a finished one.

    Args:
        report: as of `llmft.runtime.Runtime`.

    Raises:
        UserError: a name or value is not known or not allowed.
    """
    plan = parse_plan(content, WHERE)
    spec = trial_spec(plan, seed)
    store = Store(root) if root is not None else None
    if store and (stored := store.get(spec.digest)) and stored.finished:
        return stored
    with gc_paused():
        from llmft.runtime import Runtime, choose_device
        from llmft.trial import check_spec, run_trial

    check_spec(spec)
    choose_device(device)
    runtime = Runtime(device=device) if report is None else Runtime(device=device, report=report)
    if store is None:
        return run_trial(spec, runtime).record
    with store.locked():
        result = run_trial(spec, replace(runtime, keep_weights=plan.keep_weights))
        store.put(result.record, result.predictions, result.weights, result.responses)
    return result.record
