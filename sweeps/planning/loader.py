"""Load a plan: find its YAML file, read the files that it names, and parse it into a `Plan`.

Relative paths in a plan are relative to the plan's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmft.config import GenerationSpec, TrainSpec, definition_keys
from llmft.errors import UserError, error_lines, unknown_name
from llmft.methods import METHODS, method_class
from sweeps.planning.schema import (
    ForgettingPlan,
    MethodEntry,
    ModelEntry,
    ModelName,
    Plan,
    PrunePlan,
    RangeEntry,
    ReportPlan,
    SearchPlan,
)
from sweeps.planning.yaml_file import read_yaml

SHIPPED = Path(__file__).parents[1] / "plans"
REMOVED_RANGE_KEYS = {
    "when": "make two method entries of it, each with its own train or settings, and its own search",
    "levels": "name the values themselves, as in choices: [0.0001, 0.001]",
}


def load_plan(name: str, *, models: tuple[str, ...] = (), data_dir: str | None = None) -> tuple[Plan, str]:
    """Load the plan `name` (as for `find_plan`), and the name of its file for messages.

    Args:
        models: stand in for the plan's own, if there are any.
        data_dir: stands in for the plan's own, unless None.

    Raises:
        UserError: as `find_plan`, `read_yaml` and `parse_plan`.
    """
    path = find_plan(name)
    content = _read_named_files({"name": path.stem, **read_yaml(path)}, path)
    if models:
        content["models"] = list(models)
    if data_dir is not None:
        content["data_dir"] = data_dir
    return parse_plan(content, str(path) if path.parent != SHIPPED else path.name), path.name


def shipped_plans() -> tuple[str, ...]:
    """List the names of the plans that come with llmft."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def find_plan(name: str) -> Path:
    """Find the file of a plan: a path, or the bare name of a plan that comes with llmft.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped_plans():
        return SHIPPED / f"{name}.yaml"
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{name}: there is no such file. Plans that come with llmft: {', '.join(shipped_plans())}.")
    raise unknown_name("plan", name, shipped_plans())


# Files that a plan names


def _read_named_files(content: dict[str, Any], plan: Path) -> dict[str, Any]:
    """Make the paths of custom tasks absolute, and put the ids of demonstrations in place of the file that holds them.

    Args:
        content: the plan as it is written; what it gets wrong is left as it is for `parse_plan`.
        plan: the plan's file.

    Raises:
        UserError: the file with demonstrations is not there, or holds no list.
    """
    content, folder = dict(content), plan.resolve().parent
    if isinstance(tasks := content.get("tasks"), list):
        content["tasks"] = [_with_absolute_paths(task, folder) if isinstance(task, dict) else task for task in tasks]
    if isinstance(name := content.get("demonstrations"), str):
        content["demonstrations"] = _read_ids(folder / Path(name).expanduser(), f"{plan}: demonstrations")
    return content


def _with_absolute_paths(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    task = task | {name: _absolute(task[name], folder) for name in ("train", "dev", "test") if name in task}
    if isinstance(test := task.get("test"), dict):
        task["test"] = test = test | ({"in_domain": _absolute(test["in_domain"], folder)} if "in_domain" in test else {})
        if isinstance(others := test.get("out_of_domain"), dict):
            test["out_of_domain"] = {name: _absolute(table, folder) for name, table in others.items()}
    return task


def _absolute(table: Any, folder: Path) -> Any:
    if isinstance(table, str):
        return str(folder / Path(table).expanduser())
    if isinstance(table, dict) and isinstance(table.get("file"), str):
        return table | {"file": _absolute(table["file"], folder)}
    return table


def _read_ids(path: Path, where: str) -> list[str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{where}: {path} is no JSON ({error}).") from None
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise UserError(f'{where}: {path} must hold a list of ids of examples, such as ["rte_train/17", "rte_train/4"].')
    return ids


# From a mapping to a plan


def parse_plan(content: dict[str, Any], where: str) -> Plan:
    """Parse the plan that a mapping describes.

    Raises:
        UserError: a key is unknown or a value is not allowed; one line that begins with `where`.
    """
    content = dict(content)
    if isinstance(models := content.get("models"), list):
        content["models"] = [{"name": entry} if isinstance(entry, str) else entry for entry in models]
    if isinstance(methods := content.get("methods"), dict):
        content["methods"] = {name: _written_out(entry or {}, f"{where}: methods.{name}") for name, entry in methods.items()}
    try:
        return Plan.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise UserError(error_lines(error, where, _known_keys(content), lambda section, key: _section_of(content, section, key))) from None
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def _written_out(entry: Any, where: str) -> Any:
    """Write out a method entry: a teacher that is only a name becomes a mapping; keys that are not supported any more are errors."""
    if not isinstance(entry, dict):
        return entry
    entry = dict(entry)
    if isinstance(teacher := entry.get("teacher"), str):
        entry["teacher"] = {"name": teacher}
    if isinstance(search := entry.get("search"), dict):
        entry["search"] = {name: _without_removed_keys(span, f"{where}.search.{name}") for name, span in search.items()}
    return entry


def _without_removed_keys(span: Any, where: str) -> Any:
    for key in REMOVED_RANGE_KEYS if isinstance(span, dict) else ():
        if span.get(key):  # it is empty in plans that earlier versions wrote out in full
            raise UserError(f"{where}: {key} is not supported any more; {REMOVED_RANGE_KEYS[key]}.")
    return {key: value for key, value in span.items() if key not in REMOVED_RANGE_KEYS} if isinstance(span, dict) else span


def _known_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Collect the keys that each section of this plan may have."""
    known: dict[str, Any] = {"": Plan.model_fields, "search": SearchPlan.model_fields, "report": ReportPlan.model_fields}
    known["search.prune"], known["forgetting"] = PrunePlan.model_fields, ForgettingPlan.model_fields
    models, methods, tasks = content.get("models"), content.get("methods"), content.get("tasks")
    for index, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict):
            known |= definition_keys(f"tasks.{index}", task)
    for index in range(len(models) if isinstance(models, list) else 0):
        known[f"models.{index}"] = ModelEntry.model_fields
    for name, entry in methods.items() if isinstance(methods, dict) else ():
        known[f"methods.{name}"] = MethodEntry.model_fields
        known[f"methods.{name}.teacher"] = ModelName.model_fields
        search = entry.get("search") if isinstance(entry, dict) else None
        for key in search if isinstance(search, dict) else ():
            known[f"methods.{name}.search.{key}"] = RangeEntry.model_fields
    return known


def _section_of(content: dict[str, Any], section: str, key: str) -> str:
    """Find the section for a hyper-parameter that stands at the top, or directly in a method's entry; "" if there is none."""
    if section == "":
        return "train" if key in TrainSpec.model_fields else "generation" if key in GenerationSpec.model_fields else ""
    parent, _, name = section.partition(".")
    if parent != "methods" or name not in content["methods"]:
        return ""
    method = content["methods"][name].get("method") or name
    if method in METHODS and key in method_class(method).Settings.model_fields:
        return f"{section}.settings"
    return f"{section}.train" if key in TrainSpec.model_fields else ""
