"""The Ray that a sweep runs in: its own on this machine, or a running cluster; and what it leaves on the disk."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

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

import psutil  # noqa: E402
import ray  # noqa: E402 - reads the environment when it is imported
from ray.air._internal import usage  # noqa: E402

usage.tag_callbacks = lambda callbacks: False  # no usage is told, and counting them imports MLflow, Comet and wandb: 1 to 2 s

from llmft.errors import UserError  # noqa: E402
from sweeps.devices import usable_cpus  # noqa: E402
from sweeps.stop import heed_sigterm  # noqa: E402

SCRATCH_PREFIX, SCRATCH_LOCK, RAY_FOLDER, SOCKET_PATH_ROOM = "llmft-ray-", "scratch.lock", "ray", 10
CONNECT_S, HEAD_LOOK_S, HEAD_MISSES = 5.0, 2.0, 8
OBJECT_STORE_BYTES = 100 * 2**20  # specs and digests are all that travels


@contextmanager
def ray_session(address: str | None, n_cpus: int, scratch: Path, verbose: bool, groups: bool = False) -> Iterator[None]:
    """A Ray of our own on this machine, or a running cluster; an existing connection is used as it is.

    Args:
        n_cpus: that a Ray of our own has at least, real or not.
        groups: whether trials run in groups of workers. Ray Train then needs the dashboard's server: what frees the places of a
            group that was stopped asks it which are left.
    """
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
            os.environ["RAY_TMPDIR"] = str(
                scratch
            )  # by which processes of this Ray find it, where there are others on the machine
            n_cpus = max(usable_cpus(), n_cpus)
            ray.init(
                address="local", num_cpus=n_cpus, include_dashboard=groups, object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(scratch / RAY_FOLDER), **quiet,
            )  # fmt: skip
            (scratch / RAY_FOLDER / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    except ConnectionError as error:
        raise UserError(f"--address: no Ray cluster answers at {address} ({' '.join(str(error).split())[:120]}).") from None
    heed_sigterm()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def muted(verbose: bool) -> Iterator[None]:
    """Within: nothing is written to standard output. Ray reports dead workers there, at any level; our own progress is elsewhere."""
    with open(os.devnull, "w") as nowhere, nullcontext() if verbose else redirect_stdout(nowhere):
        yield


@contextmanager
def watched_head(leave: Callable[[str], None]) -> Iterator[None]:
    """Within: where the head of the cluster goes away, `leave` is called, and this process ends.

    Nothing milder is possible: the main thread then hangs in Ray, which ends the process itself after a minute.

    Args:
        leave: called from another thread, with what to tell the user.
    """
    address, over = ray.get_runtime_context().gcs_address, threading.Event()
    host, _, port = address.rpartition(":")

    def watch() -> None:
        n_misses = 0
        while not over.wait(HEAD_LOOK_S):
            try:
                socket.create_connection((host, int(port)), CONNECT_S).close()
                n_misses = 0
            except OSError:
                n_misses += 1
            if n_misses == HEAD_MISSES:
                try:
                    leave(
                        f"Ray: the head at {address} does not answer any more. What has finished is stored; once there is a "
                        "cluster again, the same command goes on from there."
                    )
                finally:
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


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
        shared: a folder that all nodes see, where trials run on several; None: this machine's folder for temporary files, which
            will do for several too, since no trial reports a checkpoint to Ray.
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
            _end_processes_that_write(folder)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # in use, someone else's, or not ours at all


def _end_processes_that_write(folder: Path) -> None:
    """After a driver was killed, Ray's agents stay for a minute."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).is_relative_to(folder / RAY_FOLDER) for file in process.open_files()):
                process.kill()
        except psutil.Error:
            continue  # ended by itself, or another user's
