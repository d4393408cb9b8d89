"""Learning curves: what the dev set said during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames.columns import COLUMNS
from analysis.frames.rows import read_rows
from llmft.errors import UserError
from llmft.records import (
    RECORD_FILE,
    RecordError,
    StoragePath,
    open_folder,
    read_manifest,
    read_many,
    read_record,
    reason,
)

if TYPE_CHECKING:
    import pandas as pd

if TYPE_CHECKING:
    import pandas as pd


_COLUMNS = {"digest": "str", "step": "Int64", "epoch": "Int64", "train_loss": "float64", "learning_rate": "float64"}
_COLUMNS |= {"dev_score": "float64", "dev_loss": "float64"}


def load_curves(root: str | StoragePath, frame: pd.DataFrame) -> pd.DataFrame:
    """Every look at the dev set of the trials in `frame`, one row each: `digest`, `step`, `epoch`, `train_loss`, `learning_rate`,
    `dev_score`, `dev_loss`. A record that cannot be read has none (`analysis.load` says so)."""
    import pandas as pd

    wanted = set(frame["digest"])
    places = [path.parent for path in record_paths(root) if path.parent.name in wanted]

    def read(folder: StoragePath) -> list[dict]:
        try:
            record = read_record(folder)
        except (RecordError, OSError):
            return []
        return [{"digest": record.digest, **point.model_dump()} for point in record.curve]

    rows = [row for of_trial in read_many(read, places) for row in of_trial]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()})


_DECLARED = {column.name: column.dtype for column in COLUMNS}


def load(root: str | StoragePath) -> pd.DataFrame:
    """Every trial below `root`, one row for each selection.

    A failed trial is one row (`status` 'failed', `selection` 'none', metrics NaN); so is a record that cannot be read
    (`status` 'unreadable', `digest` the name of its folder). Rows come in the order of the digests.

    Args:
        root: the results of a sweep (`trials/<digest>/record.json` below it), or any folder of trial folders; a path or a URL
            (`llmft.records.storage`).

    Returns:
        The columns of `analysis.COLUMNS`, then those of each test set (`<set>_<metric>`, `<set>_<group>_<value>_accuracy`).

    Raises:
        UserError: the folder is not there, cannot be read or holds no record; the sweep's manifest is damaged.
    """
    import pandas as pd

    paths = record_paths(root)
    manifest = read_manifest(root)
    stages, default, entries = (manifest.stages(), "other", manifest.entries) if manifest else ({}, "report", {})
    rows = [row for of_trial in read_many(read_rows, [path.parent for path in paths]) for row in of_trial]
    for row in rows:
        row["stage"] = stages.get(row["digest"], default)
        row["base_method"] = row.get("method")
        row["method"] = entries.get(row["digest"], row["base_method"])
    of_sets = dict.fromkeys(name for row in rows for name in row if name not in _DECLARED)
    dtypes = _DECLARED | dict.fromkeys(of_sets, "float64")
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=dtype) for name, dtype in dtypes.items()})


def record_paths(root: str | StoragePath) -> list[StoragePath]:
    """Where the records below `root` lie, sorted.

    Raises:
        UserError: the folder is not there, cannot be read, or holds none.
    """
    root = open_folder(root)
    try:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Give the folder that a sweep wrote its results to.")
        trials = root / "trials" if (root / "trials").is_dir() else root
        paths = sorted(trials.rglob(RECORD_FILE))
    except OSError as error:
        raise UserError(f"{root}: results cannot be read ({reason(error)}).") from None
    if not paths:
        raise UserError(f"{root}: no trial records (trials/<digest>/{RECORD_FILE}). Run a plan first, or give another folder.")
    return paths
