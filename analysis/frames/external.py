"""A data frame of one's own as a frame of the analysis: results that no `llmft` wrote, compared and reported by the same functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames.columns import COLUMNS, DOMAINS
from llmft.config import ORACLES
from llmft.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pandas as pd


REQUIRED = ("model", "task", "method")
_DEFAULTS = {"stage": "report", "status": "finished", "selection": "none", "metric": "accuracy", "n_shots": 0, "pattern": ""}
_DEFAULTS |= {"shots_unit": "total", "n_warnings": 0}


def from_dataframe(data: pd.DataFrame) -> pd.DataFrame:
    """`data`, one row a run, with all the columns of `analysis.COLUMNS` and their types.

        data = pandas.DataFrame({"model": ..., "task": ..., "method": ..., "data_seed": ..., "out_of_domain_score": ...})
        analysis.compare(analysis.from_dataframe(data), rule="last")

    Args:
        data: `model`, `task`, `method`, and at least one of `in_domain_score` and `out_of_domain_score` (in [0, 1]). Any other
            declared column may be given; `data_seed` makes comparisons paired (the same seed must mean the same examples). What is
            not given is missing, but: every run is finished and reported, its `selection` is 'none', its metric the accuracy, its
            `pattern` '' and its `n_shots` 0. Columns that are not declared are kept as they are.

    Raises:
        UserError: a column is missing, or has values of another type, or a score lies outside [0, 1].
    """
    import pandas as pd

    scores = [f"{domain}_score" for domain in DOMAINS if f"{domain}_score" in data]
    for name in REQUIRED:
        if name not in data:
            raise UserError(f"own_frame: no column {name!r}. It needs {', '.join(REQUIRED)}; it has {', '.join(map(str, data.columns))}.")
    if not scores:
        near = unknown_name("column", "in_domain_score", map(str, data.columns))
        raise UserError(f"own_frame: neither in_domain_score nor out_of_domain_score ({near})")
    given = {name: data[name] for name in data.columns}
    given.setdefault("base_method", data["method"])
    given.setdefault("digest", pd.Series([f"own/{i}" for i in range(len(data))], index=data.index))
    for name, value in _DEFAULTS.items():  # also where single values are missing: no row may fall out of the table for that
        values = given.get(name, pd.Series([None] * len(data), index=data.index, dtype="object"))
        given[name] = values.where(values.notna(), value)
    given.setdefault("is_oracle", given["selection"].isin(ORACLES))
    if len(scores) == 2:
        given.setdefault("gap", data[scores[0]] - data[scores[1]])
    columns = {}
    for column in COLUMNS:
        values = given.pop(column.name, pd.Series([None] * len(data), index=data.index, dtype="object"))
        try:
            columns[column.name] = values.astype(column.dtype)
        except (ValueError, TypeError) as error:
            raise UserError(f"own_frame: column {column.name!r} must be {column.dtype} ({error}).") from None
    for name in scores:
        values = columns[name].dropna()
        if len(outside := values[(values < 0) | (values > 1)]):
            raise UserError(f"own_frame: {name} must lie in [0, 1] (got {outside.iloc[0]:g}); divide percentages by 100.")
    return pd.DataFrame(columns | given).reset_index(drop=True)
