"""Files that a plan names: their places count from the plan's folder, wherever it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmft.errors import UserError


def read_files(content: dict[str, Any], plan: Path) -> dict[str, Any]:
    """The plan's content with the tables of its own tasks as absolute paths, and the ids of demonstrations in place of their file.

    Args:
        content: the plan as it is written; what it gets wrong is left as it is for `sweeps.plan.parse_plan`.
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
