"""Log ended trials to experiment trackers: TensorBoard, MLflow, Weights & Biases. Off by default.

A trial is logged after its record was stored, so a killed sweep leaves no half-written run. The file `<tracker>.logged` lists what a
tracker has logged; what is missing there, since the tracker failed or was not asked for, is logged by the next run of the plan.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llmft.config import TrialSpec
from llmft.errors import Cause, UserError, unknown_name
from llmft.records import StoragePath, TrialRecord
from sweeps.execution.tracker_writers import WRITERS, LoggedTrial, Params, Writer
from sweeps.search import failed

TRACKERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""The package that each tracker needs. The tracker's name is also the extra of llmft that installs it."""

FOLDER = "tracking"
WAIT_S, WAIT_STOPPED_S = 60.0, 5.0
"""How long the end of a sweep waits for its trackers, and how long where it was stopped."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a server that is down is tried for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""What the packages are told where the user has not set it otherwise."""


def check_trackers(names: Sequence[str]) -> None:
    """Import what the trackers need, before anything is launched and in the main thread: imports in two at a time may fail.

    Raises:
        UserError: a tracker is not known, or its package cannot be imported.
    """
    for variable, value in ENVIRONMENT.items() if names else ():
        os.environ.setdefault(variable, value)
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS, "--track")
        try:
            importlib.import_module(TRACKERS[name])
        except ImportError as error:
            raise UserError(f"--track {name}: {error}. To install it: pip install 'llmft[{name}]'") from None


def params_of(entry: str, spec: TrialSpec) -> Params:
    """Describe a trial in a few readable values: of its training the rate, epochs, batch size and what differs from the defaults."""
    params = {
        "digest": spec.digest, "model": spec.model.name, "task": spec.task, "entry": entry, "method": spec.method,
        "n_shots": spec.n_shots, "pattern": spec.pattern, "precision": spec.precision, "seed": spec.data_seed,
        "stage": "search" if spec.test_sets == () else "report",
    }  # fmt: skip
    if spec.selections != ("none",):
        train = spec.train
        params |= {"learning_rate": train.learning_rate, "epochs": train.epochs, "batch_size": train.batch_size}
        params |= train.model_dump(exclude_defaults=True)
    params |= spec.settings
    return {name: value if isinstance(value, str | int | float | bool) else json.dumps(value) for name, value in params.items()}


def rows_of(record: TrialRecord) -> list[tuple[int, dict[str, float]]]:
    """Flatten a record to numbers by name: a row (optimizer step, numbers) for each evaluation on dev, and one with the results.

    The results' names are `<selection>/dev_score`, `<selection>/<set>_<metric>`, `findings/<severity>` (how many), `cost/<what>`,
    `failed` and `pruned` (0 or 1); the curve's are `curve/<what>`.
    """
    rows: list[tuple[int, dict[str, float]]] = []
    for point in record.curve:
        numbers = point.model_dump(exclude={"step", "epoch"}, exclude_none=True)
        rows.append((point.step, {f"curve/{name}": value for name, value in numbers.items()}))
    results: dict[str, Any] = {"failed": int(failed(record)), "pruned": int(record.cause is Cause.PRUNED)}
    results |= {f"{selection}/dev_score": score for selection, score in record.dev_score.items()}
    for selection, sets in record.metrics.items():
        results |= {f"{selection}/{name}_{numbers.metric}": numbers.score for name, numbers in sets.items()}
    severities = Counter(finding.severity for finding in record.findings)
    results |= {f"findings/{severity}": severities[severity] for severity in ("note", "warning", "error")}
    costs = record.cost.model_dump() if record.cost else {}
    results |= {f"cost/{name}": value for name, value in costs.items() if isinstance(value, int | float)}
    numbers = {name: value for name, value in results.items() if value is not None}
    return [*rows, (rows[-1][0] if rows else 1, numbers)]


def logged_trial(entry: str, record: TrialRecord) -> LoggedTrial:
    """Describe an ended trial to a tracker; `entry` is the plan's name for the method."""
    spec, group = record.spec, f"{entry} {record.spec.task} {record.spec.n_shots} shots"
    name = f"{group} seed {spec.data_seed} {record.digest}"
    return LoggedTrial(record.digest, name, group, params_of(entry, spec), tuple(rows_of(record)), failed(record))


class Tracker:
    """Log ended trials in a thread of its own, up to the first error, so that a tracker can neither fail nor delay a sweep.

    Args:
        name: for messages and files.
        folder: for its files.
        build: makes the writer; called in the thread.
        say: prints a line.
    """

    def __init__(self, name: str, folder: Path, build: Callable[[], Writer], say: Callable[[str], None]):
        self.name, self._folder, self._build, self._say = name, folder, build, say
        self._logged = folder / f"{name}.logged"  # a line for every trial: digest and status
        self._queue: SimpleQueue[tuple[str, TrialRecord] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self._thread.start()

    def ended(self, entry: str, record: TrialRecord) -> None:
        """Log a trial, sooner or later; one that was logged before is left out.

        Args:
            entry: the plan's name for the method.
            record: of the trial.
        """
        if self._thread.is_alive():
            self._queue.put((entry, record))

    def finish(self) -> None:
        """Say that nothing more will end."""
        self._queue.put(None)

    def wait(self, wait_s: float) -> None:
        """Wait until all is logged, but no longer than `wait_s`."""
        patient_s = min(1.0, wait_s)
        self._thread.join(patient_s)
        if self._thread.is_alive() and wait_s > patient_s:
            self._say(f"--track {self.name}: still logging, for at most {wait_s:.0f} s ...")
            self._thread.join(wait_s - patient_s)
        if self._thread.is_alive():
            self._say(f"--track {self.name}: not everything is logged yet; the same command logs the rest later.")

    def _run(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            logged = set(self._logged.read_text().splitlines()) if self._logged.exists() else set()
            writer = self._build()
            with open(self._logged, "a", encoding="utf-8") as file:
                while item := self._queue.get():
                    entry, record = item
                    line = f"{record.digest} {record.status}"
                    if line not in logged:
                        writer.log(logged_trial(entry, record))
                        logged.add(line)
                        print(line, file=file, flush=True)
            writer.close()
        except BaseException as error:  # also what a library does to end its process
            reason = next(iter(str(error).splitlines()), "")[:300]
            self._say(
                f"--track {self.name}: off from here on, for it failed ({type(error).__name__}: {reason}). "
                "The sweep goes on; the same command logs the rest later."
            )


@contextmanager
def tracking(names: Sequence[str], root: StoragePath, sweep: str, say: Callable[[str], None]) -> Iterator[list[Tracker]]:
    """The trackers of a sweep, as long as it runs.

    Args:
        names: of the trackers, from `TRACKERS`.
        root: the folder of results. Where it is at a URL, what trackers write lies below the working folder.
        sweep: its name, under which a tracker files the trials.
        say: prints a line.

    Raises:
        UserError: as `check_trackers`.
    """
    check_trackers(names)
    trackers: list[Tracker] = []
    if names:
        folder = root.absolute() / FOLDER if isinstance(root, Path) else Path(FOLDER).absolute() / sweep
        trackers = [Tracker(name, folder, partial(WRITERS[name], folder, sweep), say) for name in dict.fromkeys(names)]
    wait_s = WAIT_STOPPED_S
    try:
        yield trackers
        wait_s = WAIT_S
    finally:
        for tracker in trackers:
            tracker.finish()
        deadline = time.monotonic() + wait_s
        for tracker in trackers:
            tracker.wait(max(0.0, deadline - time.monotonic()))
