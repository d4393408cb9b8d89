"""Where rows come from: a file in a local folder, or a split on the hub. Both give a list of dictionaries.

Files of the hub are read as they are, without the `datasets` library: offline it gives whatever it loaded last, of any revision
(its issue 7928), and that cannot be told from the rows that were asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft import hub
from llmft.config import DataRef
from llmft.data.table_files import read_rows
from llmft.errors import UserError


@dataclass(frozen=True)
class Source:
    """One table of a task.

    Attributes:
        files: names that the file may have in a local folder; the first that exists is read.
        hub: (repository, configuration, split, revision) of parquet files on the hub; configuration None stands for the only one
            that there is. Every public data set has its rows as parquet files under the revision `refs/convert/parquet`.
            None: it is not on the hub, and a local folder must hold it.
        columns: the names of the columns where a text file has no header.
        hub_columns: the columns to read of the hub's files, where others are large (whole books); a dot leads into a structure.
        obtain: where to get a file that is not on the hub.
        holds: the columns that the task reads, and the values of its labels, for messages.
    """

    files: tuple[str, ...]
    hub: tuple[str, str | None, str, str] | None
    columns: tuple[str, ...] = ()
    hub_columns: tuple[str, ...] = ()
    obtain: str = ""
    holds: str = ""

    def find(self, directory: str | None) -> Path:
        """Find the local file.

        Raises:
            UserError: none of `files` is in the folder.
        """
        if directory is None:
            raise UserError(
                f"data: {self.files[0]} is not on the hub; give a folder that holds it with --data-dir (data_dir in a plan). "
                f"The rest still comes from the hub. The file: {self.obtain}."
            )
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"data_dir: {folder} is not a folder. Give a folder that holds {self.files[0]}, or leave it out to use the hub."
            )
        if (path := self.look_in(folder)) is None:
            other = ", or leave data_dir out to use the hub" if self.hub else f"; the hub has it not. It is {self.obtain}"
            raise UserError(f"data_dir: {folder} holds none of {', '.join(self.files)}. Put one of them there{other}.")
        return path

    def look_in(self, folder: Path) -> Path | None:
        """Find the local file; None if the folder holds none."""
        return next((folder / name for name in self.files if (folder / name).is_file()), None)

    def comes_from_hub(self, data: DataRef) -> bool:
        """Whether the rows are those of the hub: without a folder, and beside one where `resolve_sources` found a commit."""
        return self.hub is not None and (data.directory is None or data.commit(*self.hub[::3]) is not None)

    def paths(self, data: DataRef) -> list[Path]:
        """Find the files with the rows, and fetch those of the hub that its cache lacks.

        Raises:
            UserError: none is there, or they cannot be fetched.
        """
        if self.hub is None or not self.comes_from_hub(data):
            return [self.find(data.directory)]
        repository, configuration, split, revision = self.hub
        commit = data.commit(repository, revision) or hub.pin(repository, revision, "dataset")
        patterns = [f"{configuration or '*'}/{split}{rest}" for rest in ("-*.parquet", "/*.parquet")]  # pushed, converted
        folder = hub.fetch(repository, commit, patterns, "dataset")
        files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if len({path.relative_to(folder).parts[0] for path in files}) != 1:
            held = "none" if not files else "several configurations"
            raise UserError(
                f"data: {repository} at revision {revision} holds {held} of {' and '.join(patterns)}. Correct the task's Source."
            )
        return files

    def origin(self, data: DataRef) -> str:
        """Say which copy of the rows it is: the local file's name, or the commit on the hub."""
        if self.hub is None or not self.comes_from_hub(data):
            return self.find(data.directory).name
        repository, _, _, revision = self.hub
        return f"{repository}@{data.commit(repository, revision) or revision}"

    def rows(self, data: DataRef) -> list[dict[str, Any]]:
        """Read every row.

        Raises:
            UserError: as `paths`, or a file is damaged.
        """
        parts = self.hub_columns if data.directory is None else ()
        return [row for path in self.paths(data) for row in read_rows(path, self.columns, parts)]


def resolve_sources(sources: Sequence[Source], directory: str | None) -> DataRef:
    """Fingerprint the current contents of `sources` and, on the hub, resolve the commits that hold them.

    A folder goes before the hub. What it holds nothing of comes from the hub, by whole repositories: a folder with one split of a
    repository must hold the others that are needed.

    The contents and not the commits make the fingerprint, so a local copy of the hub's files is the same data, and so is a
    repository of which only the description was changed.

    Raises:
        UserError: a file is not there, or cannot be fetched.
    """
    local = [source for source in sources if source.hub is None]
    if directory is not None:
        folder = Path(directory).expanduser()
        held = {source.hub[0] for source in sources if source.hub and source.look_in(folder)}
        local += [source for source in sources if source.hub and (source.hub[0] in held or not folder.is_dir())]
    for source in local:  # nothing is asked of the hub while a file is missing that it shall not give
        source.paths(DataRef(directory=directory))
    wanted = sorted({(source.hub[0], source.hub[3]) for source in sources if source.hub and source not in local})
    try:
        data = DataRef(directory=directory, commits=_pinned(wanted))
        hashes = [content_hash(source.paths(data)) for source in sources]
    except UserError as error:
        if directory is None:
            raise
        missing = ", ".join(source.files[0] for source in sources if source not in local)
        raise UserError(f"data_dir: {directory} does not hold {missing}, and {str(error).removeprefix('data: ')}") from None
    return data.model_copy(update={"fingerprint": hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]})


def _pinned(wanted: Sequence[tuple[str, str]]) -> tuple[tuple[str, str, str], ...]:
    """Resolve (repository, revision) to (repository, revision, commit); the error names all that cannot be resolved."""
    commits, failed = [], {}
    for name, revision in wanted:
        try:
            commits.append((name, revision, hub.pin(name, revision, "dataset")))
        except UserError as error:
            failed[f"{name} ({revision})"] = error
    if failed:
        first, *others = failed
        raise UserError(f"{failed[first]}" + (f" Nor can {' and '.join(others)} be had." if others else ""))
    return tuple(commits)


def content_hash(paths: Iterable[Path]) -> str:
    """Hash the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
