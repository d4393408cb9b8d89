"""Files that a plan names: their places count from the plan's folder, wherever it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
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

SHIPPED = Path(__file__).parents[1] / "plans"


def _known_keys(content: dict[str, Any]) -> dict[str, Any]:
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


def _belongs(content: dict[str, Any], section: str, key: str) -> str:
    """The section of a plan for a hyper-parameter that stands at the top, or directly in a method's entry."""
    if section == "":
        return "train" if key in TrainSpec.model_fields else "generation" if key in GenerationSpec.model_fields else ""
    parent, _, name = section.partition(".")
    if parent != "methods" or name not in content["methods"]:
        return ""
    method = content["methods"][name].get("method") or name
    if method in METHODS and key in method_class(method).Settings.model_fields:
        return f"{section}.settings"
    return f"{section}.train" if key in TrainSpec.model_fields else ""


def _written_out(content: dict[str, Any]) -> dict[str, Any]:
    """A model or teacher that is only a name becomes a mapping, and so does a method without overrides."""
    content = dict(content)
    if isinstance(models := content.get("models"), list):
        content["models"] = [{"name": entry} if isinstance(entry, str) else entry for entry in models]
    if isinstance(methods := content.get("methods"), dict):
        content["methods"] = {name: _with_teacher({} if entry is None else entry) for name, entry in methods.items()}
    return content


def _with_teacher(entry: Any) -> Any:
    teacher = entry.get("teacher") if isinstance(entry, dict) else None
    return {**entry, "teacher": {"name": teacher}} if isinstance(teacher, str) else entry


def parse_plan(content: dict[str, Any], where: str) -> Plan:
    """The plan that a mapping describes.

    Raises:
        UserError: a key is unknown or a value is not allowed; one line that begins with `where`.
    """
    try:
        return Plan.model_validate_json(json.dumps(_written_out(content), default=str))
    except (ValidationError, TypeError) as error:
        text = f"{where}: {error}"
        if isinstance(error, ValidationError):
            text = error_lines(error, where, _known_keys(content), lambda section, key: _belongs(content, section, key))
        raise UserError(text) from None


def shipped_plans() -> tuple[str, ...]:
    """Names of the plans that come with llmft."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def find_plan(name: str) -> Path:
    """The file of a plan: a path, or the bare name of a plan that comes with llmft.

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


def load_plan(name: str, *, models: tuple[str, ...] = (), data_dir: str | None = None) -> tuple[Plan, str]:
    """A plan and the name of its file; `models` and `data_dir` stand in for the file's own.

    Raises:
        UserError: as `find_plan`, `read_yaml` and `parse_plan`.
    """
    path = find_plan(name)
    content = read_files({"name": path.stem, **read_yaml(path)}, path)
    if models:
        content["models"] = list(models)
    if data_dir is not None:
        content["data_dir"] = data_dir
    return parse_plan(content, str(path) if path.parent != SHIPPED else path.name), path.name


def read_files(content: dict[str, Any], plan: Path) -> dict[str, Any]:
    """The plan's content with the tables of its own tasks as absolute paths, and the ids of demonstrations in place of their file.

    Args:
        content: the plan as it is written; what it gets wrong is left as it is for `sweeps.planning.loader.parse_plan`.
        plan: the plan's file.

    Raises:
        UserError: the file with demonstrations is not there, or holds no list.
    """
    content, folder = dict(content), plan.resolve().parent
    if isinstance(tasks := content.get("tasks"), list):
        content["tasks"] = [_with_places(task, folder) if isinstance(task, dict) else task for task in tasks]
    if isinstance(name := content.get("demonstrations"), str):
        content["demonstrations"] = _ids(folder / Path(name).expanduser(), f"{plan}: demonstrations")
    return content


def _with_places(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    places = ("train", "dev", *(["test"] if isinstance(task.get("test"), str) else []))
    placed = {name: _placed(table, folder) if name in places else table for name, table in task.items()}
    if isinstance(test := placed.get("test"), dict):
        out = test.get("out_of_domain")
        out = {name: _placed(table, folder) for name, table in out.items()} if isinstance(out, dict) else out
        placed["test"] = {
            name: out if name == "out_of_domain" else _placed(table, folder) if name == "in_domain" else table
            for name, table in test.items()
        }
    return placed


def _placed(table: Any, folder: Path) -> Any:
    if isinstance(table, str):
        return str(folder / Path(table).expanduser())
    if isinstance(table, dict) and isinstance(table.get("file"), str):
        return table | {"file": _placed(table["file"], folder)}
    return table


def _ids(path: Path, where: str) -> list[str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{where}: {path} is no JSON ({error}).") from None
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise UserError(f'{where}: {path} must hold a list of ids of examples, such as ["rte_train/17", "rte_train/4"].')
    return ids


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {  # dates stay text
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BOOLEAN = "tag:yaml.org,2002:bool"  # in YAML 1.1 also yes, no, on and off; in 1.2 these two alone
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != _BOOLEAN] for first, entries in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# YAML 1.1 reads 1e-3 as text, because it has no point
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_value(text: str) -> Any:
    """What one value means, as it would in a file.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: the file is not there, not YAML, repeats a key or holds no mapping; one line with file and line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = (getattr(error, "problem", None) or str(error).splitlines()[0]).strip()
        raise UserError(f"{where}: not readable as YAML: {problem}.") from None
    if not isinstance(content, dict):
        got = "a list" if isinstance(content, list) else "nothing" if content is None else f"one value, {content!r}"
        raise UserError(
            f"{path}: holds {str(got)[:80]} in place of keys with values (key: value). A plan needs at least models, tasks and methods."
        )
    return content
