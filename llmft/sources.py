"""Where rows come from: a file in a local folder, or a split on the hub. Both give a list of dictionaries.

Files of the hub are read as they are, without the `datasets` library: offline it gives whatever it loaded last, of any revision
(its issue 7928), and that cannot be told from the rows that were asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft import hub
from llmft.errors import UserError
from llmft.spec import DataRef


@dataclass(frozen=True)
class Source:
    """One table of a task.

    Attributes:
        files: names under which a local folder may hold it; the first that is there is taken.
        hub: (repository, configuration, split, revision) of parquet files on the hub; configuration None stands for the only one
            that there is. Every public data set has its rows as parquet files under the revision `refs/convert/parquet`.
        columns: of the hub's files, those that are read, where others are large (whole books); a dot leads into a structure.
    """

    files: tuple[str, ...]
    hub: tuple[str, str | None, str, str]
    columns: tuple[str, ...] | None = None

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

    def paths(self, data: DataRef) -> list[Path]:
        """The files with the rows; those of the hub are fetched if they are not in its cache.

        Raises:
            UserError: none is there, or they cannot be fetched.
        """
        return self._hub_files(data.commit(self.hub[0], self.hub[3])) if data.directory is None else [self.find(data.directory)]

    def _hub_files(self, commit: str | None) -> list[Path]:
        repository, configuration, split, revision = self.hub
        commit = commit or hub.pin(repository, revision, "dataset")
        patterns = [f"{configuration or '*'}/{split}{rest}" for rest in ("-*.parquet", "/*.parquet")]  # pushed, converted
        folder = hub.fetch(repository, commit, patterns, "dataset")
        files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if len({path.relative_to(folder).parts[0] for path in files}) != 1:
            found = "none" if not files else "several configurations"
            raise UserError(
                f"data: {repository} at revision {revision} holds {found} of {' and '.join(patterns)}. Correct the task's Source."
            )
        return files

    def origin(self, data: DataRef) -> str:
        """Which copy the rows are, for a person: the local file's name, or the commit on the hub."""
        repository, _, _, revision = self.hub
        return (
            self.find(data.directory).name
            if data.directory
            else f"{repository}@{data.commit(repository, revision) or revision}"
        )

    def rows(self, data: DataRef) -> list[dict[str, Any]]:
        """Every row.

        Raises:
            UserError: as `paths`, or a file is damaged.
        """
        columns = None if data.directory or self.columns is None else list(self.columns)
        return [row for path in self.paths(data) for row in _file_rows(path, columns)]


def resolve_sources(sources: Sequence[Source], directory: str | None) -> DataRef:
    """The data that `sources` are now: their contents as one fingerprint and, from the hub, the commits that hold them.

    The contents and not the commits make the fingerprint, so a local copy of the hub's files is the same data, and so is a
    repository of which only the description was changed.

    Raises:
        UserError: a file is not there, or cannot be fetched.
    """
    wanted = sorted({(source.hub[0], source.hub[3]) for source in sources}) if directory is None else []
    commits = tuple((name, revision, hub.pin(name, revision, "dataset")) for name, revision in wanted)
    data = DataRef(directory=directory, commits=commits)
    hashes = (_content_hash(source.paths(data)) for source in sources)
    return data.model_copy(update={"fingerprint": hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]})


def _content_hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file_rows(path: Path, columns: list[str] | None) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.json as json
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:  # `read_table` would give a structure's parts without the structure
                return file.read(columns=columns).to_pylist()
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


def checked_references(texts: Any, where: str) -> tuple[str, ...]:
    """The texts that count as right, without white space around them.

    Args:
        texts: what the row holds: one text or several.

    Raises:
        UserError: there is none, or one is empty or no text.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: the references {texts!r} must be texts, and not empty. Correct the row or leave it out.")
    return tuple(text.strip() for text in texts)


def numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, place for an error message, row) of each row."""
    for index, row in enumerate(rows):
        yield f"{name}/{index}", f"{name}, row {index}", row
