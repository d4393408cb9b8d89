"""Files with rows: parquet, CSV, tab-separated text, JSON and JSON lines, each as a list of dictionaries.

Cells of text files stay text: a column of sentences in which one is "1984" is no column of numbers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llmft.errors import UserError

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document
FORMATS = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")


LocatedRow = tuple[str, dict[str, Any]]
"""The location of a row, for error messages: its (first) line of a text file, or its number from 1; and the row."""


def read_rows(path: Path, columns: Sequence[str] = (), parts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read every row of a file; the arguments and errors are those of `located_rows`."""
    return [row for _, row in located_rows(path, columns, parts)]


def located_rows(path: Path, columns: Sequence[str] = (), parts: Sequence[str] = ()) -> list[LocatedRow]:
    """Read every row of a file, with its location. The suffix says what kind of file it is.

    A `.csv` has commas, a `.tsv` tabs; both may quote with `"`. A `.txt` has tabs, and a quote is a character like any other.

    Args:
        columns: the names of the columns of a text file without a header.
        parts: the columns to read of a parquet file; a dot leads into a structure. Empty: all.

    Raises:
        UserError: the file is not there, damaged, not in UTF-8, or of another kind; one line with the file and, where known, the line.
    """
    try:
        match path.suffix:
            case ".parquet":
                return _by_number(_parquet_rows(path, parts))
            case ".csv":
                return list(_delimited_rows(path, ",", columns, csv.QUOTE_MINIMAL))
            case ".tsv" | ".txt":
                quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if path.suffix == ".tsv" and not columns else csv.QUOTE_NONE
                return list(_delimited_rows(path, "\t", columns, quoting))
            case ".jsonl":
                return list(_json_lines(path))
            case ".json":
                return _json_rows(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    raise UserError(f"{path}: is no kind of file that holds rows. Kinds: {', '.join(FORMATS)}.")


def _by_number(rows: Sequence[dict[str, Any]]) -> list[LocatedRow]:
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _damaged(where: str, problem: object, kind: str) -> UserError:
    return UserError(
        f"{where}: cannot be read ({str(problem).splitlines()[0]}). The file is damaged or no {kind}; correct it or fetch it again."
    )


def _parquet_rows(path: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:  # `read_table` would give a structure's parts without the structure
            return file.read(columns=list(parts) or None).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(str(path), error, "parquet") from None


def _text(path: Path) -> str:
    """Decode the file's text, without the byte order mark that some programs put in front of UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: is not in UTF-8 (byte {content[error.start]:#04x}). Save the file as UTF-8.") from None


def _delimited_rows(path: Path, delimiter: str, columns: Sequence[str], quoting: Literal[0, 1, 2, 3]) -> Iterator[LocatedRow]:
    text, kind = io.StringIO(_text(path), newline=""), path.suffix[1:]  # newline "": line ends inside quotes stay as they are
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = list(columns) or next(reader, [])
        if not header:
            raise _damaged(str(path), "it is empty", kind)
        if twice := {name for name in header if header.count(name) > 1}:
            raise UserError(f"{path}: the header names the column {min(twice)!r} twice.")
        end = reader.line_num
        for cells in reader:
            begin, end = end + 1, reader.line_num  # a cell in quotes may go over several lines
            if not cells:
                continue  # an empty line
            if len(cells) != len(header):
                problem = f"{len(cells)} cells where there are {len(header)} columns"
                raise _damaged(f"{path}, line {begin}", problem, kind)
            yield f"line {begin}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise _damaged(f"{path}, line {reader.line_num}", error, kind) from None


def _json_lines(path: Path) -> Iterator[LocatedRow]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _damaged(f"{path}, line {number}", error, "jsonl") from None
            yield f"line {number}", _checked_row(row, f"{path}, line {number}")


def _json_rows(path: Path) -> list[LocatedRow]:
    text = _text(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        if not text.lstrip().startswith("{"):
            raise _damaged(str(path), error, "json") from None
        return list(_json_lines(path))  # many write one object a line under this ending
    if not isinstance(rows, list):
        rows = [rows]
    return _by_number([_checked_row(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)])


def _checked_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no object with named values (got {type(row).__name__}).")
    return row
