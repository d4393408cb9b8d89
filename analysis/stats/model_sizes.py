"""TODO."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def model_size(name: str) -> float:
    """Number of parameters that a model's name tells ('facebook/opt-1.3b': 1.3e9); infinite where it tells none."""
    found = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([kmb])(?![a-z0-9])", name.lower())
    return float(found[-1][0]) * _UNITS[found[-1][1]] if found else float("inf")


def model_order(name: str) -> tuple[float, str]:
    """What models are sorted by: the size in their names, those without one last."""
    return model_size(name), name


def by_model(rows: pd.DataFrame, *others: str) -> list[tuple[tuple, pd.DataFrame]]:
    """((model, value of each of `others`), rows): what `groupby` gives, with the models by size."""
    return sorted(rows.groupby(["model", *others]), key=lambda each: (model_order(each[0][0]), *each[0][1:]))


def size_name(name: str) -> str:
    """'125M' for 'facebook/opt-125m'; the name itself where it tells no size."""
    size = model_size(name)
    if size == float("inf"):
        return name
    unit = next(unit for unit in "bmk" if size >= _UNITS[unit])
    return f"{size / _UNITS[unit]:g}{unit.upper()}"
