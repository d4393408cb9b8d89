"""Read what the trials answered to each test example: as a data set, and as scores."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from analysis.frames.loading import record_paths
from llmft.errors import UserError
from llmft.records import (
    PREDICTIONS_FILE,
    RECORD_FILE,
    RecordError,
    StoragePath,
    UrlPath,
    read_many,
    read_record,
    reason,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow.dataset


def open_predictions(root: str | StoragePath, digest: str | Iterable[str] | None = None) -> pyarrow.dataset.Dataset:
    """Open the per-example predictions as a data set that reads only the columns and rows that are asked of it.

    Example: `open_predictions(root, digest).to_table(columns=["id", "prediction"], filter=pc.field("set") == "hans").to_pandas()`.

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
    contents = [content for content in read_many(_checked, [paths[name] for name in wanted]) if content is not None]
    files, schemas = [file for file, _ in contents], {schema: None for _, schema in contents}  # of labels, of texts, or both
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


def _location(path: StoragePath) -> str:
    return path.location if isinstance(path, UrlPath) else str(path)


def _checked(folder: StoragePath) -> tuple[StoragePath, pyarrow.Schema] | None:
    """Return the predictions file in `folder` and its columns; None where the record names no file."""
    import pyarrow.parquet

    if (content := read_predictions(folder)) is None:
        return None
    return folder / PREDICTIONS_FILE, pyarrow.parquet.read_schema(io.BytesIO(content)).remove_metadata()


def example_scores(root: str | StoragePath, trials: pd.DataFrame, set_name: str) -> tuple[pd.DataFrame, list[str]]:
    """Score each trial on each example of a set: 1 for a right answer and 0 for a wrong one, or the score of a generated text.

    Args:
        root: the results that `trials` come from.
        trials: rows of the frame, one for each trial; `selection` tells which answers.
        set_name: name of the test set.

    Returns:
        The scores  # [trials, examples], by digest and id; trials that left no answers for this set are absent. And what could not
        be read, a line each.
    """
    import pandas as pd

    folders = {path.parent.name: path.parent for path in record_paths(root)}
    wanted = {row["digest"]: row for row in trials[["digest", "selection", "metric"]].to_dict("records") if row["digest"] in folders}

    def read(folder: StoragePath) -> pd.Series | str | None:
        try:
            content = read_predictions(folder)
        except (RecordError, OSError) as error:
            return str(error)
        trial = wanted[folder.name]
        return None if content is None else _scores(content, trial["selection"], set_name, trial["metric"])

    results = dict(zip(wanted, read_many(read, [folders[digest] for digest in wanted]), strict=True))
    rows = {digest: scores for digest, scores in results.items() if isinstance(scores, pd.Series) and len(scores)}
    table = pd.DataFrame(list(rows.values()), index=list(rows)).dropna(axis="columns")  # examples that every trial answered
    return table, [problem for problem in results.values() if isinstance(problem, str)]


def shared_examples(tables: Iterable[pd.DataFrame]) -> list[str]:
    """Return the ids of the examples that every trial of every table answered, sorted; tables without trials do not count."""
    ids = [set(table.columns) for table in tables if len(table)]
    return sorted(set.intersection(*ids)) if ids else []


def _scores(content: bytes, selection: str, set_name: str, metric: str) -> pd.Series:
    import pyarrow.compute as pc
    import pyarrow.parquet as parquet

    file = io.BytesIO(content)
    names = parquet.read_schema(file).names
    values = [metric] if metric in names else ["label", "prediction"]
    here = (pc.field("set") == set_name) & (pc.field("selection") == selection)
    table = parquet.read_table(file, columns=["id", *values], filters=here).to_pandas().set_index("id")
    if metric in names:
        return table[metric].astype("float32")
    return (table["label"] == table["prediction"]).astype("float32")


def read_predictions(folder: StoragePath) -> bytes | None:
    """Read the content of the predictions file in a trial's folder; None where the record names no file.

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
