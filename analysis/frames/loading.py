"""Read the records of a sweep into frames: the trials, and their learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.frames.columns import trial_frame, typed_frame
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


_CURVE_DTYPES = {"digest": "str", "step": "Int64", "epoch": "Int64", "train_loss": "float64", "learning_rate": "float64"}
_CURVE_DTYPES |= {"dev_score": "float64", "dev_loss": "float64"}


def load(root: str | StoragePath) -> pd.DataFrame:
    """Load every trial below `root`, one row for each selection.

    A failed trial is one row (`status` 'failed', `selection` 'none', metrics NaN); so is a record that cannot be read
    (`status` 'unreadable', `digest` the name of its folder). Rows come in the order of the digests.

    Args:
        root: the results of a sweep (`trials/<digest>/record.json` below it), or any folder of trial folders; a path or a URL
            (`llmft.records.storage`).

    Returns:
        The columns of `analysis.frames.columns.COLUMNS`, then those of each test set (`<set>_<metric>`,
        `<set>_<group>_<value>_accuracy`).

    Raises:
        UserError: the folder is not there, cannot be read or holds no record; the sweep's manifest is damaged.
    """
    rows = [row for of_trial in read_many(read_rows, [path.parent for path in record_paths(root)]) for row in of_trial]
    for row in rows:
        row["base_method"] = row.get("method")
    assign_stages(rows, root)
    return trial_frame(rows)


def load_curves(root: str | StoragePath, frame: pd.DataFrame) -> pd.DataFrame:
    """Load the learning curves of the trials in `frame`, one row for each evaluation on dev during training.

    Returns:
        `digest`, `step`, `epoch`, `train_loss`, `learning_rate`, `dev_score`, `dev_loss`. A record that cannot be read has no rows
        (`analysis.load` says so).

    Raises:
        UserError: as `load`.
    """
    digests = set(frame["digest"])

    def read(folder: StoragePath) -> list[dict[str, Any]]:
        try:
            record = read_record(folder)
        except (RecordError, OSError):
            return []
        return [{"digest": record.digest, **point.model_dump()} for point in record.curve]

    folders = [path.parent for path in record_paths(root) if path.parent.name in digests]
    return typed_frame([row for of_trial in read_many(read, folders) for row in of_trial], _CURVE_DTYPES)


def assign_stages(rows: list[dict[str, Any]], root: str | StoragePath) -> None:
    """Set `stage` and `method` (its name in the plan) of rows with `digest` and `base_method`, from the manifest in `root`.

    Without a manifest every trial is reported; trials that a manifest does not name have the stage 'other'.
    """
    manifest = read_manifest(root)
    stages, default, entries = (manifest.stages(), "other", manifest.entries) if manifest else ({}, "report", {})
    for row in rows:
        row["stage"] = stages.get(row["digest"], default)
        row["method"] = entries.get(row["digest"], row["base_method"])


def record_paths(root: str | StoragePath) -> list[StoragePath]:
    """List the record files below `root`, sorted.

    Raises:
        UserError: the folder is not there, cannot be read, or holds none.
    """
    root = open_folder(root)
    try:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Give the folder that a sweep wrote its results to.")
        trials = root / "trials" if (root / "trials").is_dir() else root
        paths: list[StoragePath] = sorted(trials.rglob(RECORD_FILE))
    except OSError as error:
        raise UserError(f"{root}: results cannot be read ({reason(error)}).") from None
    if not paths:
        raise UserError(f"{root}: no trial records (trials/<digest>/{RECORD_FILE}). Run a plan first, or give another folder.")
    return paths
