"""The task that a definition describes: rows from the user's own files, checked one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmft import hub
from llmft.config import FIELD, CustomTask, DataRef, GenerationSpec, Pattern, Table, label_text
from llmft.data.rows import checked_references
from llmft.data.sources import Source, content_hash
from llmft.data.table_files import RowLocation, located_rows
from llmft.data.task import Example, Task, TaskData, TestSet
from llmft.errors import UserError, error_lines

MOST_LABELS = 50  # so many values are rather texts or numbers than labels
RARE = 3  # a label that so few rows hold may be a typo


class TableTask(Task):
    """A task of the user's own."""

    def __init__(self, definition: CustomTask):
        self.definition, self.kind, self.metric = definition, definition.kind, definition.metric
        self.labels = tuple(definition.labels)
        self._places = {label_text(value): place for place, value in enumerate(definition.labels.values())}
        self.patterns = {
            name: Pattern(entry.template, entry.label_prefix, entry.verbalizer, entry.without)
            for name, entry in definition.patterns.items()
        }
        self.verbalizers = definition.verbalizers
        self.in_domain = definition.name
        self.out_of_domain = tuple(definition.test.out_of_domain)

    @property
    def generation(self) -> GenerationSpec | None:
        return GenerationSpec(max_new_tokens=self.definition.max_new_tokens) if self.definition.generates else None

    def resolve_data(self, directory: str | None = None) -> DataRef:
        """The files, or splits on the hub, that the definition names, wherever `directory` is."""
        tables = self.definition.tables
        wanted = sorted({(table.hub.repository, table.hub.revision) for table in tables.values() if table.hub})
        data = DataRef(commits=tuple((name, revision, hub.pin(name, revision, "dataset")) for name, revision in wanted))
        hashes = (f"{name} {content_hash(_paths(table, data))}" for name, table in tables.items())
        return data.model_copy(update={"fingerprint": hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]})

    def load(self, data: DataRef) -> TaskData:
        tables = {name: _rows(table, data) for name, table in self.definition.tables.items()}
        sets = {
            name: tuple(
                self._example(f"{name}/{index}", self.definition.tables[name], place, row)
                for index, (place, row) in enumerate(rows)
                if self._takes(row)
            )
            for name, rows in tables.items()
        }
        for name, examples in sets.items():
            if not examples:
                raise UserError(f"{self.definition.tables[name]}: holds no rows.")
        tests = [TestSet(self.in_domain, "in", sets[self.in_domain])]
        tests += [TestSet(name, "out", sets[name]) for name in self.out_of_domain]
        pool, n_of = sets["train"], Counter(example.label for example in sets["train"])
        rare = [example.id for example in pool if self.labels and n_of[example.label] <= RARE]
        return TaskData(
            pool,
            tuple(tests),
            revision=_origin(self.definition.test.in_domain, data),
            dev_pool=sets.get("dev", ()),
            places={id_: f"{self.definition.train}, {tables['train'][int(id_.removeprefix('train/'))][0]}" for id_ in rare},
        )

    def _takes(self, row: dict[str, Any]) -> bool:
        column = self.definition.references
        if not self.definition.drop_empty or column not in row:
            return True
        return row[column] is not None and bool(row[column].strip() if isinstance(row[column], str) else row[column])

    def _example(self, id_: str, table: Table, place: str, row: dict[str, Any]) -> Example:
        definition, optional, where = self.definition, self.definition.optional, f"{table}, {place}"
        answer = definition.references if definition.generates else definition.label
        needed = [column for field, column in definition.columns.items() if field not in optional]
        for column in (*needed, answer, *definition.groups, *filter(None, [definition.rationale])):
            if column not in row:
                raise _no_column(table, place, column, row)
        fields = {field: row.get(column) for field, column in definition.columns.items()}
        for field, text in fields.items():
            if field in optional and (text is None or (isinstance(text, str) and not text.strip())):
                fields[field] = ""
                continue
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{where}: column {definition.columns[field]!r} holds no text (got {text!r}). Correct the row or leave it out."
                )
        if definition.generates:
            return Example(id_, fields, None, references=checked_references(row[answer], f"{where}, column {answer!r}"))
        label = _label(row[definition.label], where, definition.label)
        if label not in self._places:
            raise UserError(
                f"{where}: label {row[definition.label]!r} in column {definition.label!r} is not one of {', '.join(self._places)}. "
                "Correct the row, or add it to the task's labels."
            )
        groups, rationale = {group: str(row[group]) for group in definition.groups}, row.get(definition.rationale) or ""
        if not isinstance(rationale, str):
            raise UserError(f"{where}: column {definition.rationale!r} holds no text (got {rationale!r}). Correct the row or leave it out.")
        return Example(id_, fields, self._places[label], groups, rationale=rationale.strip())


def complete(definition: CustomTask, data: DataRef) -> CustomTask:
    """The definition with what it leaves out: the labels that the training pool holds, columns of the fields' names, label words.

    Raises:
        UserError: the pool cannot be read, or holds no fitting labels.
    """
    fields = [field for entry in definition.patterns.values() for field in FIELD.findall(entry.template)]
    columns = definition.columns or {field: field for field in fields}
    if definition.generates:
        return definition.model_copy(update={"columns": columns})
    labels = definition.labels or _labels_in(_rows(definition.train, data), definition.train, definition.label)
    verbalizers = definition.verbalizers or {"labels": tuple(labels)}
    first = next(iter(verbalizers))
    content = definition.model_dump(mode="json") | {"columns": columns, "labels": labels, "verbalizers": verbalizers}
    for entry in content["patterns"].values():
        entry["verbalizer"] = entry["verbalizer"] or first
    try:
        return CustomTask.model_validate_json(json.dumps(content))
    except ValidationError as error:  # what only the labels of the files show
        raise UserError(error_lines(error, f"with the labels {', '.join(labels)}")) from None


def _no_column(table: Table, place: str, column: str, row: dict[str, Any]) -> UserError:
    """Every row of a file with a header lacks the column; each row of JSON has names of its own."""
    kind = ".parquet" if table.hub else Path(table.file).suffix
    where = f"{table}, {place}" if kind in (".json", ".jsonl") else str(table)
    what = f"no column {column!r}" + (" in the header" if kind in (".csv", ".tsv", ".txt") else "")
    return UserError(f"{where}: there is {what}. Columns: {', '.join(map(str, row))}.")


def _labels_in(rows: Iterable[RowLocation], table: Table, column: str) -> dict[str, str]:
    found: set[str] = set()
    for place, row in rows:
        if column not in row:
            raise _no_column(table, place, column, row)
        found.add(_label(row[column], f"{table}, {place}", column))
    if not 2 <= len(found) <= MOST_LABELS:
        raise UserError(
            f"{table}: column {column!r} holds {len(found)} different values; name the task's labels if it is the right column."
        )
    return {label: label for label in sorted(found, key=_numbers_first)}


def _numbers_first(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _label(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str | int | float) or label_text(value) in ("", "nan"):
        raise UserError(f"{where}: column {column!r} holds no label (got {value!r}). Correct the row or leave it out.")
    return label_text(value)


def _paths(table: Table, data: DataRef) -> list[Path]:
    if table.hub is not None:
        hub_table = table.hub
        return Source((), (hub_table.repository, hub_table.configuration, hub_table.split, hub_table.revision)).paths(data)
    path = Path(table.file).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    return [path]


def _origin(table: Table, data: DataRef) -> str:
    if table.hub is None:
        return Path(table.file).name
    return f"{table.hub.repository}@{data.commit(table.hub.repository, table.hub.revision)}"


def _rows(table: Table, data: DataRef) -> list[RowLocation]:
    """The rows; on the hub a table may be several files, each with rows from 1."""
    paths = _paths(table, data)
    if len(paths) == 1:
        return located_rows(paths[0])
    return [(f"{path.name}, {place}", row) for path in paths for place, row in located_rows(path)]
