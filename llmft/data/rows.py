"""Rows to examples: check the label, texts and references of a row, and number the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmft.data.task import Example
from llmft.errors import UserError


def checked_label(row: dict[str, Any], n_labels: int, where: str) -> int:
    """Read the row's label as an index.

    Raises:
        UserError: the row has none, or it is not one of the task's.
    """
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():  # from a text file
        label = int(label)
    if not isinstance(label, int) or not 0 <= label < n_labels:
        raise UserError(f"{where}: label {label!r} is not one of the task's labels 0 to {n_labels - 1}. Correct the row or leave it out.")
    return label


def checked_fields(row: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, str]:
    """Read the texts of a row, by field; `columns` maps fields to columns.

    Raises:
        UserError: a column is missing or holds no text.
    """
    for column in columns.values():
        if not isinstance(row.get(column), str):
            raise UserError(f"{where}: column {column!r} is missing or holds no text. Columns: {', '.join(map(str, row))}.")
    return {name: row[column] for name, column in columns.items()}


def checked_references(texts: Any, where: str) -> tuple[str, ...]:
    """Read the reference texts, without white space around them.

    Args:
        texts: the value in the row, one text or a list.

    Raises:
        UserError: there is none, or one is empty or no text.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: the references {texts!r} must be texts, and not empty. Correct the row or leave it out.")
    return tuple(text.strip() for text in texts)


def numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (id, location for error messages, row) of each row; ids count from 0, and locations from 1."""
    for index, row in enumerate(rows):
        yield f"{name}/{index}", f"{name}, row {index + 1}", row


def labelled_examples(rows: Iterable[dict[str, Any]], name: str, columns: dict[str, str], n_labels: int) -> tuple[Example, ...]:
    """Make the examples of a table whose column `label` holds indices.

    Args:
        name: of the table, the first part of every id and error message.
        columns: as for `checked_fields`.

    Raises:
        UserError: a row lacks a text, or its label is not one of the task's.
    """
    return tuple(
        Example(id_, checked_fields(row, columns, where), checked_label(row, n_labels, where)) for id_, where, row in numbered(rows, name)
    )
