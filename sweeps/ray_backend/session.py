"""The connection to the Ray that a sweep runs on: one of its own on this machine, or a running cluster.

`ray.init` alone starts, connects and ends it. What Ray reads from the environment is set before Ray is imported.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # nearly doubles the trials per second
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own snapshots are never read
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once, not after the running trials
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box at every verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import psutil  # noqa: E402
import ray  # noqa: E402

from llmft.errors import UserError  # noqa: E402
from sweeps.process import install_sigterm_handler, uninterrupted  # noqa: E402
from sweeps.ray_backend.scratch import RAY_FOLDER, scratch_folder  # noqa: E402
from sweeps.resources import usable_cpus  # noqa: E402

OBJECT_STORE_BYTES = 100 * 2**20  # specs and digests are all that travels
CONNECT_S, HEAD_CHECK_S, N_HEAD_MISSES = 5.0, 2.0, 8
HEAD_PROCESSES = ("gcs_server", "raylet")


@contextmanager
def ray_session(address: str | None, verbose: bool = False, n_cpus: int = 1, groups: bool = False) -> Iterator[None]:
    """Connect this process to a Ray; an existing connection is used as it is.

    Args:
        address: of a running cluster; None: start a Ray on this machine, which ends with the context or with this process.
        verbose: show what Ray and the workers print.
        n_cpus: CPUs that a Ray of one's own has at least, real or not.
        groups: whether trials run in groups of workers. Ray Train then needs the dashboard's server: what frees the places of a
            group that was stopped asks it which are left.

    Raises:
        UserError: nothing answers at `address`, or Ray does not start on this machine.
    """
    if ray.is_initialized():
        yield
        return
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep's own progress says what failed
    settings: dict[str, Any] = {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}
    with nullcontext(Path()) if address else scratch_folder(None) as scratch:
        if address:
            check_answers(address)
            packages = [str(Path(__file__).parents[2] / name) for name in ("llmft", "sweeps")]
            settings |= {"address": address, "runtime_env": {"py_modules": packages}}
        else:
            settings |= {"address": "local", "num_cpus": max(usable_cpus(), n_cpus), "include_dashboard": groups}
            settings |= {"object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": str(scratch / RAY_FOLDER)}
        try:
            # Ray's workers import from the directory in which Ray starts before all else, also where this process does not
            with nullcontext() if address or {"", os.getcwd()} & set(sys.path) else chdir(scratch):
                ray.init(**settings)
            install_sigterm_handler()  # Ray takes the signal over when it starts
            yield
        except ConnectionError as error:
            where = f"--address: no Ray cluster answers at {address}" if address else "Ray did not start on this machine"
            raise UserError(f"{where} ({' '.join(str(error).split())[:200]}).") from None
        except SystemExit as ended:
            if ended.code != signal.SIGTERM:
                raise
            raise KeyboardInterrupt from None
        finally:
            uninterrupted()(ray.shutdown)()  # also where the connection was half made


@contextmanager
def muted(verbose: bool) -> Iterator[None]:
    """Keep standard output silent: Ray reports dead workers there, at any level, and the sweep's progress goes elsewhere."""
    with open(os.devnull, "w") as nowhere, nullcontext() if verbose else redirect_stdout(nowhere):
        yield


@contextmanager
def watched_head(leave: Callable[[str], None]) -> Iterator[None]:
    """Call `leave` with the reason where the head goes away, and end this process.

    Nothing milder is possible: the main thread then hangs in Ray, which ends the process itself after a minute.
    """
    why_gone = _lost_process() or _silent_head(ray.get_runtime_context().gcs_address)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(HEAD_CHECK_S):
            if (why := why_gone()) and not over.is_set():
                try:
                    leave(f"Ray: {why}. What has finished is stored; the same command goes on from there.")
                finally:
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _lost_process() -> Callable[[], str] | None:
    """Check the processes that `ray.init` started beside this one; None where it started none."""
    processes = {process.name(): process for process in psutil.Process().children() if process.name() in HEAD_PROCESSES}

    def check() -> str:
        lost = [name for name, process in processes.items() if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE]
        return f"its {' and '.join(sorted(lost))} ended" if lost else ""

    return check if processes else None


def _silent_head(address: str) -> Callable[[], str]:
    """Check that the head of a cluster answers; a head that was missed a few times may only be busy."""
    host, _, port = address.rpartition(":")
    n_misses = 0

    def check() -> str:
        nonlocal n_misses
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
            n_misses = 0
        except OSError:
            n_misses += 1
        return f"the head at {address} does not answer any more" if n_misses >= N_HEAD_MISSES else ""

    return check


def check_answers(address: str) -> None:
    """Check that a cluster answers at `address`: Ray itself tries for minutes before it gives up.

    Raises:
        UserError: nothing answers, or it is no address.
    """
    if address == "auto":
        running = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # where `ray start` notes its address
        address = os.environ.get("RAY_ADDRESS") or (running.read_text().strip() if running.is_file() else "")
        if not address:
            raise UserError("--address auto: no Ray runs on this machine. Run it on one of the cluster's nodes, or give host:port.")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address: give host:port of the cluster's head, or auto on one of its nodes (got {address!r}).")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address: nothing answers at {address} ({error}). Is the cluster up, and this machine one of its nodes?"
        ) from None
