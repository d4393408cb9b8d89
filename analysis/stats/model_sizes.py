"""Read the sizes of models from their names, and sort by them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from analysis.frames import group_by

if TYPE_CHECKING:
    import pandas as pd


_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def model_size(name: str) -> float:
    """Read the number of parameters from a model's name ('facebook/opt-1.3b': 1.3e9); infinite where it tells none."""
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([kmb])(?![a-z0-9])", name.lower())
    return float(sizes[-1][0]) * _UNITS[sizes[-1][1]] if sizes else float("inf")


def model_order(name: str) -> tuple[float, str]:
    """Return the key that sorts models: the size in their names, those without one last."""
    return model_size(name), name


def by_model(rows: pd.DataFrame, *others: str) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Group `rows` by model and the columns `others`: ((model, value of each of `others`), rows), models by size."""
    return sorted(group_by(rows, ["model", *others]), key=lambda group: (model_order(group[0][0]), *group[0][1:]))


def size_name(name: str) -> str:
    """Shorten a model's name to its size: '125M' for 'facebook/opt-125m'; the name itself where it tells no size."""
    size = model_size(name)
    if size == float("inf"):
        return name
    unit = next(unit for unit in "bmk" if size >= _UNITS[unit])
    return f"{size / _UNITS[unit]:g}{unit.upper()}"
