"""Imports of torch, transformers, Ray and pandas, without the garbage collector."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_ours = False


def own_this_process() -> None:
    """From now on what `collector_off` imports is not looked through by later collections either.

    For a process that does nothing but llmft's work: whatever it held by then is never collected, garbage of others included.
    """
    global _ours
    _ours = True


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within: nothing is collected.

    Modules stay. Looking through them while they come takes a quarter of the time of an import, and looking through those of torch
    and transformers, which a collection does at some trials later, as long as three short trials.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _ours:
            gc.freeze()
        if was_on:
            gc.enable()


@cache
def import_for_trials() -> None:
    """Everything that the first trial of a worker's process would import while it runs; once, for what a later trial leaves to the
    collector must not be kept from it."""
    own_this_process()
    with gc_paused():
        import ray.train.torch  # noqa: F401
        import sklearn.metrics  # noqa: F401

        import llmft.trial  # noqa: F401


def install_sigterm_handler() -> None:
    """From now on SIGTERM is a KeyboardInterrupt. Ray takes the signal over when it starts, and would end with a stack trace."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: Ctrl-C and SIGTERM have to wait. What ends Ray must be done in full: half of it leaves processes, or waits for them.

    Raises:
        KeyboardInterrupt: at the end, where there was one meanwhile and nothing else is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was set by no Python code
    if came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
