"""One sweep at a time on a folder of results.

In a folder the lock is that of the package filelock: the kernel's, which ends with its process, however that dies; on a file system
that has none, a file with the number of the process. Object storage has no locks: there a sweep leaves a marker while it runs, of
which a second sweep warns. Two sweeps at once do the same work twice and break nothing, since records are written whole and the
same trial gives the same record.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from llmft.errors import UserError
from llmft.records import StoragePath

LOCK_FILE, MARKER_FILE = ".lock", ".running"  # the marker says which sweep runs: process, host and start


@contextmanager
def locked(root: StoragePath, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the folder `root`; on object storage, call `warn` with a line where another sweep may be running.

    Raises:
        UserError: another sweep holds the lock.
        OSError: the folder cannot be written, or its file system refuses locks.
    """
    marker, lock = root / MARKER_FILE, FileLock(root / LOCK_FILE) if isinstance(root, Path) else None
    try:
        if lock:
            with warnings.catch_warnings(action="ignore"):  # that the lock is a file where the kernel's is not to be had
                lock.acquire(timeout=0)
        elif (holder := _read(marker)) and not _has_ended(holder):
            warn(f"{root}: another sweep may be running here (process {holder}); two at once do the same work twice, but break nothing.")
    except Timeout:
        holder = _read(marker) or "unknown"
        raise UserError(
            f"{root}: another sweep is running on this folder (process {holder}). Wait for it, or choose another with --out."
        ) from None
    try:
        marker.write_bytes(f"{os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC".encode())
        yield
    finally:
        with suppress(OSError):  # a marker that stays does no harm
            marker.unlink(missing_ok=True)
        if lock:
            lock.release()


def _read(marker: StoragePath) -> str:
    return marker.read_text() if marker.exists() else ""


def _has_ended(holder: str) -> bool:
    """Whether the process of a marker is known to have ended; nothing is known of one on another host."""
    process, _, host = holder.partition(" on ")
    if host.split(" ")[0] != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
