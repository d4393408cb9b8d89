"""What concerns a whole process: SIGTERM and Ctrl-C, and the garbage collector during imports."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ours = False


def own_this_process() -> None:
    """Keep what `gc_paused` imports out of later collections too.

    Only for a process that runs nothing but llmft: whatever it holds by then is never collected, garbage of others included.
    """
    global _ours
    _ours = True


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector around imports.

    Modules stay for good. Traversing them during an import takes a quarter of its time, and a later collection that traverses torch and
    transformers takes as long as three short trials.
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


def install_sigterm_handler() -> None:
    """Turn SIGTERM into a KeyboardInterrupt. Ray takes the signal over when it starts, and would end with a stack trace."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the end: a shutdown of Ray that is interrupted leaves processes, or waits for them.

    Raises:
        KeyboardInterrupt: at the end, if a signal came and nothing else was raised.
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
