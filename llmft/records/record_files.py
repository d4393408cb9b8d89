"""A trial's folder: its record (JSON), its per-example predictions (parquet), the texts that a teacher gave (parquet) and, on
request, the trained weights (safetensors), side by side.

`record.json` is the commit point: it is written last, in one atomic step, and names the checksums of the others. A folder
without it does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress

from pydantic import ValidationError

from llmft.records.record import SCHEMA_VERSION, Evaluation, TrialRecord
from llmft.records.storage import StoragePath, open_folder, read_many, write_atomically

RECORD_FILE, PREDICTIONS_FILE, WEIGHTS_FILE = "record.json", "predictions.parquet", "weights.safetensors"
RESPONSES_FILE = "responses.parquet"
EVALUATION_FILE = "evaluation.json"


class RecordError(Exception):
    """A record file that cannot be read; the message says which, and why."""


def write_record(
    folder: StoragePath,
    record: TrialRecord,
    predictions: bytes | None = None,
    weights: bytes | None = None,
    responses: bytes | None = None,
) -> None:
    """Put one trial into `folder`: the record last.

    Raises:
        OSError: a file cannot be written. Where no earlier record stands, nothing is left of this one.
    """
    files = {}
    for content, name, checksum in (
        (predictions, PREDICTIONS_FILE, "predictions_sha256"),
        (weights, WEIGHTS_FILE, "weights_sha256"),
        (responses, RESPONSES_FILE, "responses_sha256"),
    ):
        if content is not None:
            record = record.model_copy(update={checksum: hashlib.sha256(content).hexdigest()})
            files[name] = content
    files[RECORD_FILE] = record.model_dump_json(indent=1).encode()
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError:
        with suppress(OSError):
            if not (folder / RECORD_FILE).exists():
                for name in files:
                    (folder / name).unlink(missing_ok=True)
        raise


def read_record(folder: str | StoragePath) -> TrialRecord:
    """The record in `folder`.

    Raises:
        FileNotFoundError: there is none (a trial that never ended).
        OSError: it cannot be read.
        RecordError: it is damaged, or of a newer schema.
    """
    path = open_folder(folder) / RECORD_FILE
    content = path.read_bytes()
    return _parse(TrialRecord, content, path)


def read_evaluation(folder: str | StoragePath) -> Evaluation | None:
    """What was measured with a trial's weights afterwards; None where nothing was.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is damaged, or of a newer schema.
    """
    path = open_folder(folder) / EVALUATION_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return _parse(Evaluation, content, path)


NEWER = f"schema version {{}} is newer than this program's ({SCHEMA_VERSION}); upgrade llmft."


def _parse(kind: type[TrialRecord | Evaluation], content: bytes, path: StoragePath):
    try:
        kept = kind.model_validate_json(content)
    except ValidationError as error:
        raise RecordError(f"{path}: {_why_unreadable(content, error)}") from error
    if kept.schema_version > SCHEMA_VERSION:
        raise RecordError(f"{path}: {NEWER.format(kept.schema_version)}")
    return kept


def _why_unreadable(content: bytes, error: ValidationError) -> str:
    try:
        version = json.loads(content)["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            return NEWER.format(version)
    except (ValueError, TypeError, KeyError):
        pass  # no JSON object at all: the first line of pydantic's message says where it ends
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"not a readable record ({where + ': ' if where else ''}{first['msg']}); remove the folder and run the plan again."


def read_records(root: str | StoragePath) -> Iterator[TrialRecord | RecordError]:
    """Every record below `root`, in the order of the digests; an unreadable one comes as the error itself."""

    def read(path: StoragePath) -> TrialRecord | RecordError:
        try:
            return read_record(path.parent)
        except RecordError as error:
            return error

    return read_many(read, sorted(open_folder(root).rglob(RECORD_FILE)))
