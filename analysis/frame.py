"""Records to one frame: a row for each trial and selection, with declared columns (`analysis.columns`).

Nothing is left out: a failed trial is a row, and so is a record that cannot be read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from analysis.columns import COLUMNS
from analysis.manifest import read_manifest
from analysis.rows import read_rows
from llmft.errors import UserError
from llmft.files import Place, UrlPath, open_folder, read_many, reason
from llmft.record_files import PREDICTIONS_FILE, RECORD_FILE, RecordError, read_record

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow.dataset

_DECLARED = {column.name: column.dtype for column in COLUMNS}


def load(root: str | Place) -> pd.DataFrame:
    """Every trial below `root`, one row for each selection.

    A failed trial is one row (`status` 'failed', `selection` 'none', metrics NaN); so is a record that cannot be read
    (`status` 'unreadable', `digest` the name of its folder). Rows come in the order of the digests.

    Args:
        root: the results of a sweep (`trials/<digest>/record.json` below it), or any folder of trial folders; a path or a URL
            (`llmft.files`).

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


def record_paths(root: str | Place) -> list[Place]:
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


def predictions(root: str | Place, digest: str | Iterable[str] | None = None) -> pyarrow.dataset.Dataset:
    """The per-example predictions, as a data set that reads only the columns and rows that are asked of it.

    Example: `predictions(root, digest).to_table(columns=["id", "prediction"], filter=pc.field("set") == "hans").to_pandas()`.

    Args:
        root: as for `load`.
        digest: one trial or several; None: every trial that left predictions.

    Returns:
        Columns digest, selection, set, id, label, prediction, free_prediction, label_log_probabilities (natural logarithms,
        one per label); where text is generated text, finished and the scores of each text instead of the labels. A data set of
        both kinds has all of these columns.

    Raises:
        UserError: no such folder or trial; none of the trials left predictions.
        RecordError: a record or a predictions file is damaged (checked against the checksum in the record).
    """
    import pyarrow
    import pyarrow.dataset

    paths = {path.parent.name: path.parent for path in record_paths(root)}
    wanted = list(paths) if digest is None else [digest] if isinstance(digest, str) else list(digest)
    if unknown := [name for name in wanted if name not in paths]:
        raise UserError(f"{root}: no trial {unknown[0]!r}. It holds {len(paths)} trials; analysis.load lists their digests.")
    found = [each for each in read_many(_checked, [paths[name] for name in wanted]) if each is not None]
    files, schemas = [file for file, _ in found], {schema: None for _, schema in found}  # of labels, of texts, or both
    if not files:
        raise UserError(f"{root}: none of the {len(wanted)} trials asked for left predictions (failed trials leave none).")
    bases = {file.parent.parent for file in files}
    by_digest = pyarrow.dataset.partitioning(pyarrow.schema([digest_field := pyarrow.field("digest", pyarrow.string())]))
    schema = pyarrow.unify_schemas([*schemas, pyarrow.schema([digest_field])])
    parts = [
        pyarrow.dataset.dataset(
            [_location(file) for file in files if file.parent.parent == base],
            filesystem=base.file_system if isinstance(base, UrlPath) else None,
            format="parquet",
            partitioning=by_digest,
            partition_base_dir=_location(base),
            schema=schema,
        )
        for base in sorted(bases)
    ]
    return parts[0] if len(parts) == 1 else pyarrow.dataset.dataset(parts)


def _location(path: Place) -> str:
    return path.location if isinstance(path, UrlPath) else str(path)


def _checked(folder: Place) -> tuple[Place, pyarrow.Schema] | None:
    """The predictions file in `folder` and what its columns are, if the record names one."""
    import pyarrow.parquet

    if (content := read_predictions(folder)) is None:
        return None
    return folder / PREDICTIONS_FILE, pyarrow.parquet.read_schema(io.BytesIO(content)).remove_metadata()


def read_predictions(folder: Place) -> bytes | None:
    """The content of the predictions file in a trial's folder; None where the record names none.

    Raises:
        RecordError: the record is damaged, or the file is (checked against the checksum in the record).
    """
    record, path = read_record(folder), folder / PREDICTIONS_FILE
    if record.predictions_sha256 is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: {reason(error)}; remove the folder and run the plan again.") from error
    if hashlib.sha256(content).hexdigest() != record.predictions_sha256:
        raise RecordError(
            f"{path}: truncated or changed (its {len(content)} bytes do not match the checksum in {RECORD_FILE}); "
            "remove the folder and run the plan again."
        )
    return content
