"""One trial from the command line: its spec, from options, a plan or a record; and its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llmft.config import GenerationSpec, TrainSpec, TrialSpec
from llmft.errors import UserError, error_lines, unknown_name
from llmft.methods import method_class
from llmft.records import StoragePath, TrialRecord
from sweeps.planning import ForgettingPlan, MethodEntry, ModelName, Plan, ReportPlan, build_cells, load_plan, parse_plan, read_value
from sweeps.process import gc_paused
from sweeps.store import Store

WHERE = "trial"
ENTRY_KEYS = MethodEntry.model_fields.keys() - {"method", "search", "n_shots"}
"""Keys that `--set` writes into the method's entry of the plan, where they have priority over the plan's own."""
PLAN_KEYS = (Plan.model_fields.keys() & TrialSpec.model_fields.keys()) - {"n_shots"} | {"report", "keep_weights"}
"""Keys of a plan that describe each of its trials; of `report` what its seeds vary."""


@dataclass(frozen=True)
class TrialOptions:
    """The options of `llmft trial` that describe the trial; None where one was not given.

    Attributes:
        method: name of a method, or of a method entry where `file` is a plan.
        assignments: `KEY=VALUE`, keys as in a plan (`train.batch_size`, `settings.r`, `n_dev`), values read as YAML.
        file: a plan (YAML) that the trial is a cell of, or a trial's record or spec (JSON).
    """

    task: str | None = None
    method: str | None = None
    model: str | None = None
    n_shots: int | None = None
    seed: int | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    data_dir: str | None = None
    assignments: Sequence[str] = ()
    file: str | None = None


def describe_trial(options: TrialOptions) -> tuple[TrialSpec, bool]:
    """Return the trial's spec, and whether its weights are to be kept.

    Raises:
        UserError: a name, key or value is not known or not allowed, or the plan has more than one cell that fits the options.
    """
    if options.file and options.file.endswith(".json"):
        if replace(options, file=None) != TrialOptions():
            raise UserError(f"--spec: {options.file} describes the whole trial; leave out all options but --device, --out and --json.")
        return _read_spec(Path(options.file)), False
    content = _select_cell(options, options.file) if options.file else _one_cell(options)
    for key, value in _assignments(options, content):
        _assign(content, key, value)
    plan = parse_plan(content, options.file or WHERE)
    (cell,) = build_cells(plan, options.file or WHERE)
    return cell.report_spec({}, plan.report.seeds[0] if options.seed is None else options.seed), plan.keep_weights


def _read_spec(path: Path) -> TrialSpec:
    """Read a spec from a JSON file that holds it, or holds a record with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return TrialSpec.model_validate_json(json.dumps(content.get("spec", content)))
    except ValidationError as error:
        raise UserError(error_lines(error, str(path), {"": TrialSpec.model_fields, "train": TrainSpec.model_fields})) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: holds neither a trial's record nor its spec as JSON.") from None


def _one_cell(options: TrialOptions) -> dict[str, Any]:
    """Return a plan, as a mapping, whose only cell is the trial's."""
    if options.task is None or options.method is None:
        raise UserError(f"{WHERE}: name --task and --method, or a plan or record with --spec.")
    entry = {} if options.n_shots is None else {"n_shots": [options.n_shots]}
    return {
        "name": "trial", "models": [{"name": options.model or "toy"}], "tasks": [options.task], "methods": {options.method: entry},
        "data_dir": options.data_dir,
    }  # fmt: skip


def _select_cell(options: TrialOptions, file: str) -> dict[str, Any]:
    """Return the plan of a file, as a mapping, with the one cell that the options select, and without its search."""
    plan, _ = load_plan(file, models=(options.model,) if options.model else (), data_dir=options.data_dir)
    content = plan.model_dump(mode="json")
    model = _select("model", [entry.name for entry in plan.models], None, file)
    task, name = _select("task", plan.task_names, options.task, file), _select("method", list(plan.methods), options.method, file)
    content["models"] = [entry for entry in content["models"] if entry["name"] == model][:1]
    content["tasks"] = [content["tasks"][plan.task_names.index(task)]]
    entry = content["methods"][name] | {"search": {}}
    if options.n_shots is not None:
        entry["n_shots"] = [options.n_shots]
    elif method_class(entry["method"] or name).uses_shots:
        entry["n_shots"] = [int(_select("shots", list(map(str, entry["n_shots"] or plan.n_shots)), None, file))]
    return content | {"methods": {name: entry}, "search": None}


def _select(option: str, names: Sequence[str], wanted: str | None, file: str) -> str:
    if wanted is None and len(names) > 1:
        raise UserError(f"{file}: has several cells; choose --{option} from {', '.join(names)}.")
    if wanted is not None and wanted not in names:
        raise unknown_name(option, wanted, names, file)
    return names[0] if wanted is None else wanted


def _assignments(options: TrialOptions, content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values: those with an option of their own, then those of `--set`."""
    for key, number in (("train.learning_rate", options.learning_rate), ("train.epochs", options.epochs)):
        if number is not None:
            yield key, number
    ((name, entry),) = content["methods"].items()
    known = _known_keys(entry.get("method") or name)
    for text in options.assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set: write key=value (got {text!r}).")
        if key not in known:
            ends_alike = [other for other in known if other.endswith(f".{key}")]  # `r` belongs under settings
            raise unknown_name("key", key, ends_alike or known, f"--set, method '{name}'")
        try:
            yield key, read_value(value)
        except yaml.YAMLError:
            raise UserError(f"--set: the value is not readable as YAML (got {text!r}).") from None


def _known_keys(method: str) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "settings": method_class(method).Settings, "train": TrainSpec, "generation": GenerationSpec, "model": ModelName,
        "teacher": ModelName, "report": ReportPlan, "forgetting": ForgettingPlan,
    }  # fmt: skip
    return [*(ENTRY_KEYS | PLAN_KEYS), *(f"{section}.{name}" for section, schema in sections.items() for name in schema.model_fields)]


def _assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Write a value into the mapping of a plan with one model and one method."""
    section, _, name = key.partition(".")
    (entry,) = content["methods"].values()
    if section == "model":
        content["models"][0][name] = value
        return
    target = entry if section in ENTRY_KEYS else content
    if name:
        before = target.get(section) or {}
        if not isinstance(before, dict):
            raise UserError(f"--set: {section} is {before!r} already, so that there is no {key!r}.")
        value = {**before, name: value}
    target[section] = value


def run_one(
    spec: TrialSpec,
    device: str | None = None,
    root: StoragePath | str | None = None,
    *,
    keep_weights: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> TrialRecord:
    """Run a trial, or read its record where the results in `root` hold a finished one.

    Args:
        spec: the trial.
        device: as of `llmft.runtime.Runtime`; `report` alike.
        root: the folder of results, or its URL, that the record is written to; None writes nothing.
        keep_weights: whether to write the trained weights to `root` as well.

    Raises:
        UserError: the trial cannot run as it is described, or there is no such device.
    """
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
        result = run_trial(spec, replace(runtime, keep_weights=keep_weights))
        store.put(result.record, result.predictions, result.weights, result.responses)
    return result.record
