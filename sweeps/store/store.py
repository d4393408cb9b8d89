"""The results of a sweep on disk: one folder for each trial, under its digest. What is still to run follows from these alone.

RESULTS/trials/<digest>/record.json, predictions.parquet     written by the process that ran the trial
RESULTS/plan.yaml                                            the last plan that ran here, complete with its defaults
RESULTS/sweep.json                                           that plan's cells, which records belong to it, what its searches chose

RESULTS is a folder or a URL, as in `llmft.records.storage`, where it also says how the processes on other nodes come by their credentials.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from llmft.errors import UserError
from llmft.records import (
    MANIFEST_FILE,
    RECORD_FILE,
    Manifest,
    PlannedCell,
    RecordError,
    SearchChoice,
    StoragePath,
    TrialRecord,
    may_pass,
    open_folder,
    read_record,
    read_records,
    reason,
    write_atomically,
    write_record,
)
from sweeps.planning import Plan, parse_plan, read_yaml
from sweeps.store.locks import locked

if TYPE_CHECKING:
    from sweeps.planning import Cell
    from sweeps.search import Records, Schedule


T = TypeVar("T")

PLAN_FILE, TRIALS = "plan.yaml", "trials"
WAITS_S = (3.0, 10.0, 30.0)
"""Pauses before a request to object storage is made again; pyarrow itself has by then tried for some seconds each time."""


class StoreUnwritable(UserError):
    """The results can no longer be written: the disk is full or read-only, or the storage refuses. No further trial could be kept."""


class Store:
    """The folder of results.

    Args:
        root: the folder, or its URL; made when something is first written.

    Raises:
        UserError: a URL that `llmft.records.storage.open_folder` refuses.
    """

    def __init__(self, root: StoragePath | str):
        self.root = open_folder(root)
        self._is_locked = False

    def folder(self, digest: str) -> StoragePath:
        return self.root / TRIALS / digest

    def get(self, digest: str) -> TrialRecord | None:
        """Read the record of one trial; None where it did not end.

        Raises:
            UserError: the record is damaged, or of a newer llmft; the storage cannot be read.
        """
        with self._reading():
            try:
                return _retry(lambda: read_record(self.folder(digest)), WAITS_S if self._is_locked else ())
            except FileNotFoundError:
                return None

    def find(self, beginning: str) -> str:
        """Find the digest of the only trial whose digest begins with `beginning`.

        Raises:
            UserError: there is none, or there are several; the storage cannot be read.
        """
        with self._reading():
            known = sorted({path.parent.name for path in (self.root / TRIALS).rglob(RECORD_FILE)})
        matches = [digest for digest in known if digest.startswith(beginning)]
        if len(matches) == 1:
            return matches[0]
        wrong = f"no trial begins with {beginning!r}"
        if matches:
            wrong = f"{len(matches)} trials begin with {beginning!r}; write more of the digest"
        near = matches or difflib.get_close_matches(beginning, known, cutoff=0.5)
        hint = f" Nearest: {', '.join(near[:3])}{', ...' if len(near) > 3 else ''}." if near else ""
        raise UserError(f"{self.root}: {wrong}.{hint} The digests are the names of the folders in {self.root / TRIALS}.")

    def put(self, record: TrialRecord, *files: bytes | None) -> None:
        """Write one trial, all of it or nothing; `files` as for `llmft.records.record_files.write_record`.

        Raises:
            StoreUnwritable: it cannot be written.
        """
        self._write(lambda: write_record(self.folder(record.digest), record, *files))

    def discard(self, digest: str) -> None:
        """Remove a failed record before its trial is tried again.

        Raises:
            StoreUnwritable: it cannot be removed.
        """
        self._write(lambda: (self.folder(digest) / RECORD_FILE).unlink(missing_ok=True))

    def load(self) -> dict[str, TrialRecord]:
        """Read every record, by digest.

        Raises:
            UserError: a record is damaged, or of a newer llmft; the storage cannot be read.
        """
        if isinstance(self.root, Path) and self.root.is_file():
            raise UserError(f"{self.root}: is a file, and results need a folder. Choose another place with --out.")
        records = {}
        with self._reading():
            for record in read_records(self.root / TRIALS):
                if isinstance(record, RecordError):
                    raise record
                records[record.digest] = record
        return records

    @contextlib.contextmanager
    def locked(self, warn: Callable[[str], None] = lambda line: print(f"llmft: {line}", file=sys.stderr)) -> Iterator[None]:
        """Keep other sweeps out of the folder; on object storage, only warn of them (`sweeps.store.locks`).

        Raises:
            UserError: another sweep holds the folder, or it cannot be written.
        """
        probe = self.root / TRIALS / ".writable"
        with contextlib.ExitStack() as stack:
            try:
                probe.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(probe, b"")
                probe.unlink(missing_ok=True)
                stack.enter_context(locked(self.root, warn))
            except OSError as error:
                raise StoreUnwritable(
                    f"{self.root}: results cannot be written here ({reason(error)}). Choose another folder with --out."
                ) from None
            self._is_locked = True
            try:
                self._remove_leftovers()
                yield
            finally:
                self._is_locked = False

    def _remove_leftovers(self) -> None:
        """Remove what writers that were killed left behind; object storage shows nothing of it."""
        if isinstance(self.root, Path):
            for leftover in (self.root / TRIALS).glob("*/.*.tmp"):
                leftover.unlink(missing_ok=True)

    def _write(self, action: Callable[[], None]) -> None:
        try:
            _retry(action, WAITS_S)
        except OSError as error:
            raise StoreUnwritable(
                f"{self.root}: results can no longer be written ({reason(error)}). What has finished is kept: make room, or mend "
                "the access, and give the same command again."
            ) from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except RecordError as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{self.root}: results cannot be read ({reason(error)}).") from None

    def write_plan(self, plan: Plan) -> bool:
        """Write the plan beside its results, and return whether another plan lay there.

        Raises:
            StoreUnwritable: it cannot be written.
        """
        path = self.root / PLAN_FILE
        try:
            if parse_plan(read_yaml(path), str(path)) == plan:
                return False  # left as it is: it may be a person's own file, with comments
        except UserError:
            pass
        with self._reading():
            changed = path.exists()
        content = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()
        self._write(lambda: write_atomically(path, content))
        return changed

    def write_manifest(self, plan: Plan, schedule: Schedule, records: Records) -> None:
        """Write what the plan consists of, which records belong to it, and what its searches chose.

        Raises:
            StoreUnwritable: it cannot be written.
        """
        states = schedule.states(records)
        choices = [state.choice for state in states if state.choice is not None and state.choice.cell.trains]
        manifest = Manifest(
            plan_name=plan.name,
            cells=tuple(
                PlannedCell(cell=_cell(state.cell), n_report=state.n_report, report=tuple(trial.digest for trial in state.report))
                for state in states
            ),
            report=tuple(trial.digest for state in states for trial in state.report),
            search=tuple(trial.digest for state in states for trial in state.search),
            entries={
                trial.digest: state.cell.entry
                for state in states
                if state.cell.entry != state.cell.base.method
                for trial in [*state.search, *state.report]
            },
            choices=tuple(
                SearchChoice(
                    cell=_cell(choice.cell),
                    params=choice.params or {},
                    failed=choice.params is None,
                    dev_score=choice.dev_score,
                    n_points=choice.n_points,
                    n_search_trials=choice.n_search_trials,
                    n_pruned_points=choice.n_pruned_points,
                )
                for choice in choices
            ),
        )
        content = manifest.model_dump_json(indent=1).encode()
        self._write(lambda: write_atomically(self.root / MANIFEST_FILE, content))


def _cell(cell: Cell) -> dict[str, Any]:
    base = cell.base
    return {
        "model": base.model.name,
        "task": base.task,
        "method": cell.entry,
        "n_shots": base.n_shots,
        "pattern": base.pattern,
        "settings": base.settings,
    }


def _retry(action: Callable[[], T], waits_s: Sequence[float]) -> T:
    """Call `action`, again after each pause as long as it fails for a reason that may pass."""
    for wait_s in waits_s:
        try:
            return action()
        except OSError as error:
            if not may_pass(error):
                raise
            time.sleep(wait_s)
    return action()
