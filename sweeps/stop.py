"""What a scheduler sends to end a job stops a sweep as Ctrl-C does: what has finished stays, and the same command goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def heed_sigterm() -> None:
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
