"""What a scheduler sends to end a job stops a sweep as Ctrl-C does: what has finished stays, and the same command goes on."""

from __future__ import annotations

import signal
import threading


def heed_sigterm() -> None:
    """From now on SIGTERM is a KeyboardInterrupt. Ray takes the signal over when it starts, and would end with a stack trace."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
