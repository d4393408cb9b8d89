"""Where a sweep's results lie: one folder a trial, under its digest. The store is the only truth; everything else is planned from it.

RESULTS/trials/<digest>/record.json, predictions.parquet     written by the process that ran the trial
RESULTS/plan.yaml                                            the last plan that ran here, complete with its defaults
RESULTS/sweep.json                                           which records belong to that plan, and what its searches chose
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from llmft.errors import UserError
from llmft.record import RECORD_FILE, RecordError, TrialRecord, read_record, read_records, write_atomically, write_record
from sweeps.plan import Plan, parse_plan
from sweeps.yaml_file import read_yaml

if TYPE_CHECKING:
    from sweeps.schedule import Records, Schedule

LOCK_FILE, PLAN_FILE, MANIFEST_FILE, TRIALS = ".lock", "plan.yaml", "sweep.json", "trials"


class Store:
    """The folder of results.

    Args:
        root: the folder; made when something is first written.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def folder(self, digest: str) -> Path:
        return self.root / TRIALS / digest

    def get(self, digest: str) -> TrialRecord | None:
        """The record of one trial, or None where it did not end.

        Raises:
            UserError: the record is damaged, or of a newer llmft.
        """
        try:
            return read_record(self.folder(digest))
        except FileNotFoundError:
            return None
        except RecordError as error:
            raise UserError(str(error)) from None

    def put(self, record: TrialRecord, predictions: bytes | None = None, weights: bytes | None = None) -> None:
        """Write one trial, all of it or nothing."""
        write_record(self.folder(record.digest), record, predictions, weights)

    def discard(self, digest: str) -> None:
        """Forget a failed record before its trial is tried again."""
        (self.folder(digest) / RECORD_FILE).unlink(missing_ok=True)

    def load(self) -> dict[str, TrialRecord]:
        """Every record, by digest.

        Raises:
            UserError: a record is damaged, or of a newer llmft.
        """
        records = {}
        for record in read_records(self.root / TRIALS):
            if isinstance(record, RecordError):
                raise UserError(str(record))
            records[record.digest] = record
        return records

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out of the folder; the lock ends with the process, however it dies.

        Raises:
            UserError: another sweep holds the folder, or it cannot be written.
        """
        try:
            (self.root / TRIALS).mkdir(parents=True, exist_ok=True)
            file = open(self.root / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the lock
            write_atomically(self.root / TRIALS / ".writable", b"")
            (self.root / TRIALS / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"{self.root}: results cannot be written here ({error.strerror}). Choose another folder with --out."
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"{self.root}: another sweep is running on this folder (process {holder}). Wait for it, or choose another with --out."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._sweep_up()
            yield

    def _sweep_up(self) -> None:
        """Remove what writers that were killed left behind."""
        for leftover in (self.root / TRIALS).glob("*/.*.tmp"):
            leftover.unlink(missing_ok=True)

    def write_plan(self, plan: Plan) -> bool:
        """Keep the plan beside its results; says whether another plan lay there."""
        path = self.root / PLAN_FILE
        try:
            if parse_plan(read_yaml(path), str(path)) == plan:
                return False  # left as it is: it may be a person's own file, with comments
        except UserError:
            pass
        changed = path.exists()
        write_atomically(path, yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode())
        return changed

    def write_manifest(self, plan: Plan, schedule: Schedule, records: Records) -> None:
        """Say which records belong to the plan, and what its searches chose."""
        states = schedule.states(records)
        content = {
            "plan_name": plan.name,
            "report": [trial.digest for state in states for trial in state.report],
            "search": [trial.digest for state in states for trial in state.search],
            "entries": {
                trial.digest: state.cell.entry
                for state in states
                if state.cell.entry != state.cell.base.method
                for trial in [*state.search, *state.report]
            },
            "choices": [
                {
                    "cell": {
                        "model": choice.cell.base.model.name,
                        "task": choice.cell.base.task,
                        "method": choice.cell.entry,
                        "n_shots": choice.cell.base.n_shots,
                        "pattern": choice.cell.base.pattern,
                        "settings": choice.cell.base.settings,
                    },
                    "params": choice.params or {},
                    "failed": choice.params is None,
                    "dev_accuracy": choice.dev_accuracy,
                    "n_points": choice.n_points,
                    "n_search_trials": choice.n_search_trials,
                    "n_pruned_points": choice.n_pruned_points,
                }
                for choice in (state.choice for state in states)
                if choice is not None and choice.cell.trains
            ],
        }
        write_atomically(self.root / MANIFEST_FILE, json.dumps(content, indent=1).encode())
