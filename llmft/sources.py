"""Where rows come from: a file in a local folder, or a split on the hub. Both give a list of dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.errors import UserError
from llmft.hub import hub_access


@dataclass(frozen=True)
class Source:
    """One table of a task.

    Attributes:
        files: names under which a local folder may hold it; the first that is there is taken.
        hub: (repository, configuration, split, revision). A branch as revision may move; the record's provenance and a local copy
            of the files are what pins the rows.
    """

    files: tuple[str, ...]
    hub: tuple[str, str | None, str, str]

    def find(self, directory: str) -> Path:
        """The local file.

        Raises:
            UserError: none of `files` is in the folder.
        """
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"data_dir: {folder} is not a folder. Give a folder that holds {self.files[0]}, or leave it out to use the hub."
            )
        for name in self.files:
            if (folder / name).is_file():
                return folder / name
        raise UserError(
            f"data_dir: {folder} holds none of {', '.join(self.files)}. Put one of them there, or leave data_dir out to use the hub."
        )

    @property
    def hub_name(self) -> str:
        repository, configuration, split, revision = self.hub
        return f"{repository}:{configuration or ''}:{split}@{revision}"

    def fingerprint(self, directory: str | None) -> str:
        """What tells one content of this table from another: a hash of the file, or the pinned hub revision."""
        if directory is None:
            return f"hub:{self.hub_name}"
        return hashlib.sha256(self.find(directory).read_bytes()).hexdigest()

    def rows(self, directory: str | None) -> list[dict[str, Any]]:
        """Every row.

        Raises:
            UserError: the file is damaged, or the hub cannot be reached.
        """
        return _hub_rows(self) if directory is None else _file_rows(self.find(directory))


def _file_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.json as json
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        if path.suffix in (".jsonl", ".json"):
            return json.read_json(path).to_pylist()
        tabs = csv.ParseOptions(
            delimiter="\t" if path.suffix in (".tsv", ".txt") else ",", quote_char=False if path.suffix == ".txt" else '"'
        )
        return csv.read_csv(path, parse_options=tabs).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}). The file is damaged or no {path.suffix[1:]}; fetch it again."
        ) from None


def _hub_rows(source: Source) -> list[dict[str, Any]]:
    from datasets import load_dataset

    repository, configuration, split, revision = source.hub
    try:
        with hub_access():
            return load_dataset(repository, configuration, split=split, revision=revision).to_list()
    except Exception as error:  # the hub's client raises a dozen kinds, from sockets to missing revisions
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"data: cannot load {source.hub_name} from the hub ({reason}). Check the network, or give a local folder "
            f"with {source.files[0]} by --data-dir."
        ) from None


def combined_fingerprint(sources: Iterable[Source], directory: str | None) -> str:
    """One fingerprint (16 hexadecimal digits) for several tables."""
    return hashlib.sha256("\n".join(source.fingerprint(directory) for source in sources).encode()).hexdigest()[:16]


def checked_label(row: dict[str, Any], n_labels: int, where: str) -> int:
    """The row's label as an index.

    Raises:
        UserError: the row has none, or it is not one of the task's.
    """
    label = row.get("label")
    if not isinstance(label, int) or not 0 <= label < n_labels:
        raise UserError(
            f"{where}: label {label!r} is not one of the task's labels 0 to {n_labels - 1}. Correct the row or leave it out."
        )
    return label


def checked_fields(row: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, str]:
    """The texts of a row, renamed by `columns` (field -> column).

    Raises:
        UserError: a column is missing or holds no text.
    """
    for column in columns.values():
        if not isinstance(row.get(column), str):
            raise UserError(f"{where}: column {column!r} is missing or holds no text. Columns: {', '.join(map(str, row))}.")
    return {name: row[column] for name, column in columns.items()}


def numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, place for an error message, row) of each row."""
    for index, row in enumerate(rows):
        yield f"{name}/{index}", f"{name}, row {index}", row
