"""One sweep at a time on a folder of results.

In a file system, NFS included, the lock is the kernel's: it ends with its process, however that dies. Object storage has none. There
the lock is an object that names its holder and that the holder writes anew every `RENEW_S`. One that has not been renewed for `LEASE_S`,
by the clock of the storage, or whose process is known to be dead, may be taken over. Two that take it at once settle it by reading
back who wrote last. All of this keeps two sweeps from doing the same work; should two run nevertheless, nothing breaks, since records
are written whole and the same trial gives the same record.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError

from llmft.errors import UserError
from llmft.records import StoragePath, UrlPath

LOCK_FILE = ".lock"
RENEW_S, LEASE_S = 20.0, 60.0
SETTLE_S = 1.0
"""Between writing and reading back: more than the time between reading and writing of another that starts at the same moment."""


class Lock(Protocol):
    """What holds the folder.

    `acquire` raises UserError where another sweep holds it, and OSError where it cannot be written. `check` raises UserError where
    it was lost meanwhile.
    """

    def acquire(self) -> None: ...
    def check(self) -> None: ...
    def release(self) -> None: ...


def lock_on(root: StoragePath) -> Lock:
    """The lock of this kind of folder, not yet acquired."""
    return ObjectLock(root) if isinstance(root, UrlPath) else FileLock(root)


def _held(root: StoragePath, holder: str, hint: str = "") -> UserError:
    return UserError(
        f"{root}: another sweep is running on this folder (process {holder}). Wait for it, or choose another with --out.{hint}"
    )


class FileLock:
    """`flock` on a file in the folder."""

    def __init__(self, root: Path):
        self.root = root

    def acquire(self) -> None:
        self._file = open(self.root / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except BlockingIOError:
            with self._file:
                self._file.seek(0)
                raise _held(self.root, self._file.read().strip() or "unknown") from None
        except OSError:
            self.release()
            raise

    def check(self) -> None:
        return None  # the kernel takes it from nobody

    def release(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be written is the holder's name
            self._file.close()


class Holder(BaseModel):
    """The content of a lock object."""

    token: str = ""
    process: int = 0
    host: str = "unknown"
    machine: str = ""
    time: str = ""

    @classmethod
    def here(cls) -> Holder:
        return cls(token=uuid.uuid4().hex, process=os.getpid(), host=socket.gethostname(), machine=_machine())

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended; of a process elsewhere nothing is known."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        return f"{self.process} on {self.host}"


def _machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, and its process namespace. Empty where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class ObjectLock:
    """An object in the folder, renewed by a thread."""

    def __init__(self, root: UrlPath):
        self.root, self.path, self.holder = root, root / LOCK_FILE, Holder.here()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="llmft-lock", daemon=True)

    def acquire(self) -> None:
        now = self._storage_time_s()
        found, written = self._read()
        if found and not found.dead and now - written < LEASE_S:
            raise self._refused(found)
        self._write()
        time.sleep(SETTLE_S)
        found, _ = self._read()
        if not self._is_ours(found):
            raise self._refused(found or Holder())
        self._thread.start()

    def check(self) -> None:
        found, _ = self._read()
        if not self._is_ours(found):
            by = f"process {found}" if found else "one that has ended"
            raise UserError(
                f"{self.root}: another sweep ({by}) took this folder over, for this one gave no sign of life for {LEASE_S:.0f} s. "
                "This one stops; what has finished is kept."
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError, OSError):  # another's lock stays; one that cannot be removed ends by itself
            self.check()
            self.path.unlink(missing_ok=True)

    def _is_ours(self, found: Holder | None) -> bool:
        return found is not None and found.token == self.holder.token

    def _refused(self, other: Holder) -> UserError:
        return _held(self.root, str(other), f" If it was killed: its lock ends after {LEASE_S:.0f} s.")

    def _storage_time_s(self) -> float:
        """What the storage's clock says, in seconds: the time of an object written just now."""
        probe = self.root / f"{LOCK_FILE}-{self.holder.token}"
        probe.write_bytes(b"")
        now = probe.modified_s()
        probe.unlink(missing_ok=True)
        return now

    def _read(self) -> tuple[Holder | None, float]:
        """Who holds the lock, and when that was written by the storage's clock, in seconds."""
        try:
            written, content = self.path.modified_s(), self.path.read_bytes()
        except FileNotFoundError:
            return None, 0.0
        try:
            return Holder.model_validate_json(content), written
        except ValidationError:
            return Holder(), written

    def _write(self) -> None:
        self.holder.time = datetime.now(UTC).isoformat(timespec="seconds")
        self.path.write_bytes(self.holder.model_dump_json().encode())

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.check()
                self._write()
            except UserError:
                return  # lost; the sweep's own check says so
            except OSError:
                continue  # the network may come back before the lease ends
