"""Take a data frame of one's own as a frame of the analysis: results that `llmft` did not write, for the same functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames.columns import DOMAINS, DTYPES
from llmft.config import ORACLES
from llmft.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pandas as pd


REQUIRED = ("model", "task", "method")
_DEFAULTS = {"stage": "report", "status": "finished", "selection": "none", "metric": "accuracy", "n_shots": 0, "pattern": ""}
_DEFAULTS |= {"shots_unit": "total", "n_warnings": 0}


def from_dataframe(data: pd.DataFrame) -> pd.DataFrame:
    """Give `data`, one row a run, all the columns of `analysis.frames.columns.COLUMNS` and their types.

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
            raise UserError(
                f"from_dataframe: no column {name!r}. It needs {', '.join(REQUIRED)}; it has {', '.join(map(str, data.columns))}."
            )
    if not scores:
        near = unknown_name("column", "in_domain_score", map(str, data.columns))
        raise UserError(f"from_dataframe: neither in_domain_score nor out_of_domain_score ({near})")
    missing = pd.Series([None] * len(data), index=data.index, dtype="object")
    given = {name: data[name] for name in data.columns}
    given.setdefault("base_method", data["method"])
    given.setdefault("digest", pd.Series([f"own/{i}" for i in range(len(data))], index=data.index))
    for name, value in _DEFAULTS.items():  # also where single values are missing: no row may fall out of the table for that
        values = given.get(name, missing)
        given[name] = values.where(values.notna(), value)
    given.setdefault("is_oracle", given["selection"].isin(ORACLES))
    if len(scores) == 2:
        given.setdefault("gap", data[scores[0]] - data[scores[1]])
    columns = {}
    for name, dtype in DTYPES.items():
        try:
            columns[name] = given.pop(name, missing).astype(pd.api.types.pandas_dtype(dtype))
        except (ValueError, TypeError) as error:
            raise UserError(f"from_dataframe: column {name!r} must be {dtype} ({error}).") from None
    for name in scores:
        values = columns[name].dropna()
        if len(outside := values[(values < 0) | (values > 1)]):
            raise UserError(f"from_dataframe: {name} must lie in [0, 1] (got {outside.iloc[0]:g}); divide percentages by 100.")
    return pd.DataFrame(columns | given).reset_index(drop=True)
