"""The connection to the Ray that a sweep runs in: its own on this machine, or a running cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import sweeps.ray_backend.settings  # isort: skip # noqa: F401 - before Ray, which reads them
import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader, Config
from ray.air._internal import usage
from ray.job_config import JobConfig
from ray.tune.execution import class_cache

from llmft.errors import UserError
from sweeps.process import install_sigterm_handler, uninterrupted
from sweeps.ray_backend.local_head import OwnRay

usage.tag_callbacks = lambda callbacks: False  # no usage is told, and counting them imports MLflow, Comet and wandb: 1 to 2 s

CONNECT_S, HEAD_LOOK_S, HEAD_MISSES = 5.0, 2.0, 8


@contextmanager
def ray_session(address: str | None, verbose: bool, own: OwnRay | None = None) -> Iterator[None]:
    """Within: this process is connected to the cluster at `address`, or where it is None to a Ray of its own; an existing connection
    is used as it is.

    Raises:
        UserError: nothing answers, or our own did not start.
    """
    if ray.is_initialized():
        yield
        return
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are said by our own progress
    settings: dict[str, Any] = {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}
    if address:
        check_answers(address)
        settings["runtime_env"] = {"py_modules": [str(Path(__file__).parents[2] / name) for name in ("llmft", "sweeps")]}
    with ExitStack() as left:
        if not address:
            # else Ray's workers import from the working directory before all else, even where this process does not
            settings["job_config"] = JobConfig(_client_job=not {"", os.getcwd()} & set(sys.path))
            left.enter_context(_variables(own.credentials))
            left.enter_context(_environment_inherited())
        where = address or own.address()
        left.callback(uninterrupted()(ray.shutdown))  # also where the connection was half made
        try:
            ray.init(address=where, **settings)
        except ConnectionError as error:
            whose = "--address" if address else "Ray on this machine"
            raise UserError(f"{whose}: no Ray cluster answers at {where} ({' '.join(str(error).split())[:120]}).") from None
        except SystemExit as ended:
            if ended.code != signal.SIGTERM:  # Ray takes the signal over when it starts
                raise
            raise KeyboardInterrupt from None
        install_sigterm_handler()
        yield


@contextmanager
def local_ray(n_cpus: int, groups: bool = False, verbose: bool = False) -> Iterator[None]:
    """Within: this process is connected to a Ray of its own. The arguments are those of `OwnRay.start`."""
    with OwnRay(verbose) as own:
        own.start(n_cpus, groups)
        with ray_session(None, verbose, own):
            yield


@contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    """Within: the environment has these variables, of which Ray knows."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _reread()


def _reread() -> None:
    """Ray was perhaps imported, and connected elsewhere, with other variables."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment_inherited() -> Iterator[None]:
    """Within: Tune gives its actors no variables. They inherit ours, and so can take the workers that wait since Ray came up."""
    names = ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE")
    before = {name: getattr(class_cache, name) for name in names}
    for name, value in before.items():
        setattr(class_cache, name, type(value)())
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(class_cache, name, value)


@contextmanager
def muted(verbose: bool) -> Iterator[None]:
    """Within: nothing is written to standard output. Ray reports dead workers there, at any level; our own progress is elsewhere."""
    with open(os.devnull, "w") as nowhere, nullcontext() if verbose else redirect_stdout(nowhere):
        yield


@contextmanager
def watched_head(leave: Callable[[str], None], own: OwnRay) -> Iterator[None]:
    """Within: where the head goes away, `leave` is called, and this process ends.

    Nothing milder is possible: the main thread then hangs in Ray, which ends the process itself after a minute.

    Args:
        leave: called from another thread, with what to tell the user.
        own: the Ray that this process is connected to, unless it was never started.
    """
    why_gone = own.why_ended if own.is_started else _silent_head(ray.get_runtime_context().gcs_address)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(HEAD_LOOK_S):
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


def _silent_head(address: str) -> Callable[[], str]:
    """Says that the head of a cluster answers no more, once it was asked so often that it is not merely busy."""
    host, _, port = address.rpartition(":")
    n_misses = 0

    def ask() -> str:
        nonlocal n_misses
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
            n_misses = 0
        except OSError:
            n_misses += 1
        return f"the head at {address} does not answer any more" if n_misses >= HEAD_MISSES else ""

    return ask


def check_answers(address: str) -> None:
    """See to it that a cluster answers there: Ray itself tries for minutes before it gives up.

    Raises:
        UserError: nothing does, or it is no address.
    """
    if address == "auto":
        try:
            address = canonicalize_bootstrap_address_or_die(address)
        except ConnectionError:
            raise UserError(
                "--address auto: no Ray runs on this machine. Run it on one of the cluster's nodes, or give host:port."
            ) from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address: give host:port of the cluster's head, or auto on one of its nodes (got {address!r}).")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address: nothing answers at {address} ({error}). Is the cluster up, and this machine one of its nodes?"
        ) from None
