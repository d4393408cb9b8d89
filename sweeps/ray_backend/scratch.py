"""A folder for what Ray writes on this machine, or where the nodes of a cluster see it; gone when the sweep is."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SCRATCH_PREFIX, SCRATCH_LOCK, RAY_FOLDER, SOCKET_PATH_ROOM = "llmft-ray-", "scratch.lock", "ray", 10


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
            _remove(folder)


def _remove_abandoned(folder: Path) -> None:
    try:
        with open(folder / SCRATCH_LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_processes_that_write(folder)
            _remove(folder)
    except OSError:
        return  # in use, someone else's, or not ours at all


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():  # something still writes there; the next sweep takes the rest for abandoned
        with suppress(OSError):
            (folder / SCRATCH_LOCK).touch()


def end_processes_that_write(folder: Path) -> None:
    """After a driver or a head was killed, Ray's agents stay for a minute."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).is_relative_to(folder / RAY_FOLDER) for file in process.open_files()):
                process.kill()
        except psutil.Error:
            continue  # ended by itself, or another user's
