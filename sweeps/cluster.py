"""Trials on Ray: a searcher of ours that hands out what the schedule says, and the session that it runs in.

Ray places trials, keeps workers alive and starts them again; it decides nothing. What has been run is read from the store.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # nearly doubles the trials per second
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own snapshots are never read
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must end the sweep at once, not after the running trials
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box at every verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402 - reads the environment when it is imported
from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from llmft.errors import Cause, UserError  # noqa: E402
from llmft.record import TrialRecord  # noqa: E402
from sweeps.run import Ledger  # noqa: E402
from sweeps.schedule import Planned  # noqa: E402
from sweeps.trainable import TrialTrainable  # noqa: E402

SCRATCH_PREFIX, SCRATCH_LOCK, SOCKET_PATH_ROOM = "llmft-ray-", "scratch.lock", 20
GIVE_UP_AFTER = 4
"""Trials in a row that lost their process, after which the fault is taken to lie with the machine or the installation."""

CONNECT_S = 5.0
OBJECT_STORE_BYTES = 100 * 2**20  # specs and digests are all that travels


class ScheduleSearcher(Searcher):
    """Hands out the schedule's trials, and reads from the store how they ended."""

    def __init__(self, ledger: Ledger, job: dict[str, Any]):
        super().__init__()
        self.ledger, self.job = ledger, job
        self.trials: dict[str, Planned] = {}
        self.reasons: dict[str, str] = {}  # trial id -> why its process died last
        self.error: Exception | None = None
        self._n_lost_in_a_row = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error or self.ledger.done:
            return Searcher.FINISHED
        trial = self.ledger.next_trial()
        if trial is None:
            return None
        self.trials[trial_id] = trial
        self.ledger.progress.update(self.ledger.records, len(self.ledger.running))
        return {**self.job, "digest": trial.digest, "spec": trial.spec.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        trial = self.trials.pop(trial_id)
        try:  # what is raised here would turn a finished trial into a failed one
            record = self.ledger.store.get(trial.digest) or self._lost(trial, self.reasons.get(trial_id, "no reason known"))
            if record.cause is not Cause.LOST:
                self._n_lost_in_a_row = 0
            self.ledger.ended(record)
        except Exception as problem:
            self.ledger.running.pop(trial.digest, None)
            self.error = problem

    def _lost(self, trial: Planned, reason: str) -> TrialRecord:
        """The record of a trial whose process died every time."""
        record = TrialRecord(
            digest=trial.digest,
            spec=trial.spec,
            status="failed",
            cause=Cause.LOST,
            message=f"its process died every time: {reason}",
        )
        self.ledger.store.put(record)
        self._n_lost_in_a_row += 1
        if self._n_lost_in_a_row == GIVE_UP_AFTER:
            self.error = UserError(
                f"workers: {GIVE_UP_AFTER} trials in a row lost their process, the sweep stops. The last: {reason}"
            )
        return record

    def __deepcopy__(self, memo: dict) -> ScheduleSearcher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that is never made: the store is what a sweep starts from

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        return None


class RememberReasons(tune.Callback):
    """Keeps why a process died, for the record of a trial that is lost."""

    def __init__(self, searcher: ScheduleSearcher | None = None):
        self.searcher = searcher

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        ledger = self.searcher.ledger
        ledger.progress.update(ledger.records, len(ledger.running))  # also while no trial ends

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        try:  # not `trial.get_error`: that looks where Tune's snapshots go
            text = Path(trial.error_file or "").read_text()
        except OSError:
            text = ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = self.searcher.reasons[trial.trial_id] = (lines[-1] if lines else "no reason known")[:300]
        self.searcher.ledger.progress.retried(self.searcher.trials[trial.trial_id], reason)


def run_on_ray(
    ledger: Ledger,
    *,
    address: str | None,
    workers: int | None,
    gpus_per_trial: float | None,
    max_lost: int,
    run_trial: Callable[..., Any] | None,
    verbose: bool,
) -> None:
    """Run the ledger's trials; the arguments are those of `sweeps.run.run_sweep`."""
    ledger.progress.status("starting Ray ...")
    with (
        scratch_folder(ledger.store.root.absolute() if address else None) as scratch,
        ray_session(address, workers, scratch, verbose),
    ):
        slots = share_out(ray.cluster_resources(), address, workers, gpus_per_trial)
        ledger.progress.concurrency = slots["n"]
        job = {
            "root": str(ledger.store.root.absolute()),
            "scratch": str(scratch),
            "n_threads": slots["CPU"],
            "run_trial": run_trial,
        }
        searcher = ScheduleSearcher(ledger, job)
        ledger.progress.status("starting workers ...")
        tune.Tuner(
            tune.with_resources(TrialTrainable, {"CPU": slots["CPU"], "GPU": slots["GPU"]}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=slots["n"],
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),  # fmt: skip
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[RememberReasons(searcher)],
                failure_config=tune.FailureConfig(max_failures=max_lost),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
        if searcher.error:
            raise searcher.error


def _trial_name(trial: Any) -> str:
    return trial.trial_id


def share_out(
    resources: dict[str, float], address: str | None, workers: int | None, gpus_per_trial: float | None
) -> dict[str, Any]:
    """How many trials run at a time (`n`), and the CPUs and GPUs that each gets (`CPU`, `GPU`).

    On a cluster a trial gets one CPU, since nodes differ and may still join; `workers` may then be more than there is room for.

    Raises:
        UserError: more GPUs are asked for than this machine has.
    """
    n_cpus, n_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    gpus = (1.0 if n_gpus else 0.0) if gpus_per_trial is None else gpus_per_trial
    if gpus > n_gpus and not address:
        raise UserError(f"--gpus-per-trial: {gpus:g} asked for, but Ray sees {n_gpus:g} GPUs on this machine.")
    if gpus and gpus < 1:
        room = int(n_gpus) * int(1 / gpus)
    else:
        room = int(n_gpus // gpus) if gpus else n_cpus
    n = workers or max(1, room)
    return {"n": n, "CPU": 1 if address else max(1, n_cpus // n), "GPU": gpus}


@contextmanager
def ray_session(address: str | None, workers: int | None, scratch: Path, verbose: bool) -> Iterator[None]:
    """A Ray of our own on this machine, or a running cluster; an existing connection is used as it is."""
    if ray.is_initialized():
        yield
        return
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are said by our own progress
    quiet = {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}
    if address:
        _check_answers(address)
    try:
        if address:
            packages = [str(Path(__file__).parents[1] / name) for name in ("llmft", "sweeps")]
            ray.init(address=address, runtime_env={"py_modules": packages}, **quiet)
        else:
            source = str(Path(__file__).parents[1])  # workers import the same code, installed or not
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
            n_cpus = max(len(os.sched_getaffinity(0)), workers or 0)
            ray.init(
                address="local", num_cpus=n_cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(scratch / "ray"), **quiet,
            )  # fmt: skip
    except ConnectionError as error:
        raise UserError(f"--address: no Ray cluster answers at {address} ({' '.join(str(error).split())[:120]}).") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes before it gives up."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address: give host:port of the cluster's head, or auto on one of its nodes (got {address!r}).")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address: nothing answers at {address} ({error}). Is the cluster up, and this machine one of its nodes?"
        ) from None


@contextmanager
def scratch_folder(shared: Path | None) -> Iterator[Path]:
    """A folder for what Ray writes, removed at the end; those of sweeps that were killed are removed at the start.

    Args:
        shared: a folder that all nodes see, where trials run on several; None: this machine's folder for temporary files.
    """
    parent = shared or Path(tempfile.gettempdir())
    if not shared and len(str(parent)) > SOCKET_PATH_ROOM:
        parent = Path("/tmp")
    for folder in parent.glob(f"{SCRATCH_PREFIX}*"):
        _remove_abandoned(folder)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=parent))
    with open(folder / SCRATCH_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held while this process lives
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    try:
        with open(folder / SCRATCH_LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # in use, someone else's, or not ours at all
