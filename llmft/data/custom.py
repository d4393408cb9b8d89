"""Tasks on the user's own tables: load and check the rows that a definition names, and complete what it leaves out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmft import hub
from llmft.config import CustomTask, DataRef, GenerationSpec, Table, label_text
from llmft.data.rows import checked_references
from llmft.data.sources import Source, content_hash
from llmft.data.table_files import LocatedRow, located_rows
from llmft.data.task import Example, Task, TaskData, TestSet
from llmft.errors import UserError, error_lines

MOST_LABELS = 50  # a column with more values holds texts or numbers rather than labels
RARE = 3  # a label of so few rows may be a typo


class TableTask(Task):
    """A task whose rows come from the user's own tables, as a `CustomTask` describes it."""

    def __init__(self, definition: CustomTask):
        self.definition, self.kind, self.metric = definition, definition.kind, definition.metric
        self.labels = tuple(definition.labels)
        self._index = {label_text(value): index for index, value in enumerate(definition.labels.values())}
        self.patterns, self.verbalizers = definition.patterns, definition.verbalizers
        self.in_domain = definition.name
        self.out_of_domain = tuple(definition.test.out_of_domain)

    @property
    def generation(self) -> GenerationSpec | None:
        return GenerationSpec(max_new_tokens=self.definition.max_new_tokens) if self.definition.generates else None

    def resolve_data(self, directory: str | None = None) -> DataRef:
        """Fingerprint the files, or splits on the hub, that the definition names; `directory` is not used."""
        tables = self.definition.tables
        repositories = sorted({(table.hub.repository, table.hub.revision) for table in tables.values() if table.hub})
        data = DataRef(commits=tuple((name, revision, hub.pin(name, revision, "dataset")) for name, revision in repositories))
        hashes = (f"{name} {content_hash(_paths(table, data))}" for name, table in tables.items())
        return data.model_copy(update={"fingerprint": hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]})

    def load(self, data: DataRef) -> TaskData:
        located = {name: _rows(table, data) for name, table in self.definition.tables.items()}
        sets = {
            name: tuple(
                self._example(f"{name}/{index}", self.definition.tables[name], location, row)
                for index, (location, row) in enumerate(rows)
                if self._takes(row)
            )
            for name, rows in located.items()
        }
        for name, examples in sets.items():
            if not examples:
                raise UserError(f"{self.definition.tables[name]}: holds no rows.")
        tests = [TestSet(self.in_domain, "in", sets[self.in_domain])]
        tests += [TestSet(name, "out", sets[name]) for name in self.out_of_domain]
        pool, counts = sets["train"], Counter(example.label for example in sets["train"])
        rare = [example.id for example in pool if self.labels and counts[example.label] <= RARE]
        return TaskData(
            pool,
            tuple(tests),
            revision=_origin(self.definition.test.in_domain, data),
            dev_pool=sets.get("dev", ()),
            locations={id_: f"{self.definition.train}, {located['train'][int(id_.removeprefix('train/'))][0]}" for id_ in rare},
        )

    def _takes(self, row: dict[str, Any]) -> bool:
        column = self.definition.references
        if not self.definition.drop_empty or column not in row:
            return True
        return row[column] is not None and bool(row[column].strip() if isinstance(row[column], str) else row[column])

    def _example(self, id_: str, table: Table, location: str, row: dict[str, Any]) -> Example:
        definition, optional, where = self.definition, self.definition.optional, f"{table}, {location}"
        answer = definition.references if definition.generates else definition.label
        required = [column for field, column in definition.columns.items() if field not in optional]
        for column in (*required, answer, *definition.groups, *filter(None, [definition.rationale])):
            if column not in row:
                raise _no_column(table, location, column, row)
        fields = {}
        for field, column in definition.columns.items():
            text = row.get(column)
            is_empty = text is None or (isinstance(text, str) and not text.strip())
            fields[field] = "" if is_empty and field in optional else _text(text, where, column)
        if definition.generates:
            return Example(id_, fields, None, references=checked_references(row[answer], f"{where}, column {answer!r}"))
        label = _label(row[answer], where, answer)
        if label not in self._index:
            raise UserError(
                f"{where}: label {row[answer]!r} in column {answer!r} is not one of {', '.join(self._index)}. "
                "Correct the row, or add it to the task's labels."
            )
        groups, rationale = {group: str(row[group]) for group in definition.groups}, row.get(definition.rationale)
        if rationale and not isinstance(rationale, str):
            raise _no_text(rationale, where, definition.rationale)
        return Example(id_, fields, self._index[label], groups, rationale=(rationale or "").strip())


def complete(definition: CustomTask, data: DataRef) -> CustomTask:
    """Fill in what a definition leaves out: labels as the training pool holds them, columns named as the fields, label words.

    Raises:
        UserError: the pool cannot be read, or holds no fitting labels.
    """
    columns = definition.columns or {field: field for pattern in definition.patterns.values() for field in pattern.fields}
    if definition.generates:
        return definition.model_copy(update={"columns": columns})
    labels = definition.labels or _labels_in(_rows(definition.train, data), definition.train, definition.label)
    verbalizers = definition.verbalizers or {"labels": tuple(labels)}
    first = next(iter(verbalizers))
    content = definition.model_dump(mode="json") | {"columns": columns, "labels": labels, "verbalizers": verbalizers}
    for pattern in content["patterns"].values():
        pattern["verbalizer"] = pattern["verbalizer"] or first
    try:
        return CustomTask.model_validate_json(json.dumps(content))
    except ValidationError as error:  # what only the labels of the files show
        raise UserError(error_lines(error, f"with the labels {', '.join(labels)}")) from None


def _no_column(table: Table, location: str, column: str, row: dict[str, Any]) -> UserError:
    """Say which column is missing. Every row of a file with a header lacks it; each row of JSON has names of its own."""
    kind = Path(table.file).suffix if table.file else ".parquet"
    where = f"{table}, {location}" if kind in (".json", ".jsonl") else str(table)
    what = f"no column {column!r}" + (" in the header" if kind in (".csv", ".tsv", ".txt") else "")
    return UserError(f"{where}: there is {what}. Columns: {', '.join(map(str, row))}.")


def _labels_in(rows: Iterable[LocatedRow], table: Table, column: str) -> dict[str, str]:
    labels: set[str] = set()
    for location, row in rows:
        if column not in row:
            raise _no_column(table, location, column, row)
        labels.add(_label(row[column], f"{table}, {location}", column))
    if not 2 <= len(labels) <= MOST_LABELS:
        raise UserError(
            f"{table}: column {column!r} holds {len(labels)} different values; name the task's labels if it is the right column."
        )
    return {label: label for label in sorted(labels, key=_numbers_first)}


def _numbers_first(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _label(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str | int | float) or label_text(value) in ("", "nan"):
        raise UserError(f"{where}: column {column!r} holds no label (got {value!r}). Correct the row or leave it out.")
    return label_text(value)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _no_text(value, where, column)
    return value


def _no_text(value: Any, where: str, column: str) -> UserError:
    return UserError(f"{where}: column {column!r} holds no text (got {value!r}). Correct the row or leave it out.")


def _paths(table: Table, data: DataRef) -> list[Path]:
    if table.hub:
        return Source((), (table.hub.repository, table.hub.configuration, table.hub.split, table.hub.revision)).paths(data)
    path = Path(str(table.file)).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    return [path]


def _origin(table: Table, data: DataRef) -> str:
    if table.hub:
        return f"{table.hub.repository}@{data.commit(table.hub.repository, table.hub.revision)}"
    return Path(str(table.file)).name


def _rows(table: Table, data: DataRef) -> list[LocatedRow]:
    """Read the rows; a table on the hub may be several files, each with rows from 1."""
    paths = _paths(table, data)
    if len(paths) == 1:
        return located_rows(paths[0])
    return [(f"{path.name}, {location}", row) for path in paths for location, row in located_rows(path)]
