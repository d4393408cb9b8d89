"""Where results lie: a folder of this machine or of a network file system, or a URL of S3 or Google Cloud Storage.

    results/rte                         /mnt/nfs/rte                         file:///mnt/nfs/rte
    s3://BUCKET/PREFIX                  ?region=..., and for other servers than Amazon's ?endpoint_override=HOST:PORT&scheme=http
    gs://BUCKET/PREFIX

A folder is a `pathlib.Path`; a URL is a `UrlPath`, which has those of its methods that results need. The rest of llmft does not
tell them apart. The URL's options are pyarrow's, which does the transport.

Credentials never stand in a URL. Each process takes those of the machine that it runs on: the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; GOOGLE_APPLICATION_CREDENTIALS), the user's configuration (~/.aws; gcloud), or the role
of the instance or pod. Ray's workers on this machine inherit the environment of `llmft sweep`. On a running cluster they have that
of the `ray start` of their own node, never that of the driver: give every node a role that may list, read, write and delete below
the prefix (on AWS an IAM instance profile), or set the variables where its Ray is started.

This module imports pyarrow when a URL is first used, and never torch, Ray or pandas.
"""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode

from llmft.errors import UserError, unknown_name

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


T = TypeVar("T")

DEFAULTS = {"s3": {}, "gs": {"retry_limit_seconds": "15"}}
"""Scheme -> options that a URL has unless it says otherwise. Google's client would try for 15 minutes."""

N_READERS = 24  # pyarrow keeps 25 connections to a server


@dataclass(frozen=True, order=True)
class UrlPath:
    """A place on object storage. The methods do what those of `pathlib.Path` of the same name do, and raise `OSError` as they do.

    There are no folders: one is there as long as an object lies below it. `str` gives the whole URL, which `open_folder` reads.
    """

    scheme: str
    bucket: str
    key: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> UrlPath:
        return replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> UrlPath:
        return replace(self, key=self.key.rpartition("/")[0])

    def absolute(self) -> UrlPath:
        return self

    @property
    def file_system(self) -> FileSystem:
        return _connect(self.scheme, self.bucket, self.query)[0]

    @property
    def location(self) -> str:
        """The path within `file_system`."""
        return f"{_connect(self.scheme, self.bucket, self.query)[1]}/{self.key}".rstrip("/")

    def read_bytes(self) -> bytes:
        with self.file_system.open_input_file(self.location) as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        """All of `content` or nothing: an object appears when its stream is closed.

        pyarrow closes a stream also when it is left by an exception. The content therefore goes in with one call: between two, an
        exception would publish the half that is written.
        """
        file = self.file_system.open_output_stream(self.location)
        file.write(content)
        file.close()

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        return None

    def exists(self) -> bool:
        return self._info().type.name != "NotFound"

    def is_dir(self) -> bool:
        return self._info().type.name == "Directory"

    def _info(self) -> FileInfo:
        return self.file_system.get_file_info(self.location)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.file_system.delete_file(self.location)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rglob(self, pattern: str) -> list[UrlPath]:
        """The objects below whose names match."""
        from pyarrow.fs import FileSelector, FileType

        base = self.location
        found = self.file_system.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
        files = (info for info in found if info.type is FileType.File and fnmatchcase(info.base_name, pattern))
        return [self / info.path[len(base) + 1 :] for info in files]


StoragePath = Path | UrlPath


@functools.cache
def _connect(scheme: str, bucket: str, query: str) -> tuple[FileSystem, str]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    url = f"{scheme}://{bucket}?{urlencode(DEFAULTS[scheme] | dict(parse_qsl(query)))}"
    try:
        return FileSystem.from_uri(url)
    except ArrowInvalid as error:
        raise UserError(f"{scheme}://{bucket}{f'?{query}' if query else ''}: not a usable URL ({reason(error)}).") from None


def open_folder(root: str | StoragePath) -> StoragePath:
    """The folder of results that a person named. Nothing is read or connected to.

    Raises:
        UserError: a URL of another kind, without a bucket, or with credentials in it.
    """
    if isinstance(root, UrlPath):
        return root
    scheme, separator, rest = str(root).partition(":/")
    if not separator or not re.fullmatch(r"[A-Za-z][\w+.-]+", scheme):
        return Path(root)
    if scheme not in ("file", *DEFAULTS):
        raise unknown_name("kind of URL", f"{scheme}://", [f"{known}://" for known in ("file", *DEFAULTS)], str(root))
    if not rest.startswith("/"):
        raise UserError(f"{root}: a URL begins with {scheme}://; hand it over as text, since a Path loses one of the slashes.")
    place, _, query = rest[1:].partition("?")
    bucket, _, key = place.partition("/")
    if scheme == "file":
        if bucket not in ("", "localhost"):
            raise UserError(f"{root}: write file:///PATH with the whole path.")
        return Path("/" + unquote(key))
    if not bucket:
        raise UserError(f"{root}: names no bucket. Write {scheme}://BUCKET/PREFIX.")
    if ":" in bucket and "@" in bucket:
        raise UserError(f"{scheme}://...: credentials do not belong in a URL, which is printed. Put them into the environment.")
    if ":" in bucket:
        raise UserError(f"{root}: write {scheme}://BUCKET/PREFIX?endpoint_override={bucket} for a server that is not the cloud's.")
    return UrlPath(scheme, bucket, "/".join(filter(None, key.split("/"))), query)


def write_atomically(path: StoragePath, content: bytes) -> None:
    """All of `content` or nothing, also when the process is killed in between. Missing folders are made.

    Raises:
        OSError: it cannot be written; what was begun is removed.
    """
    if isinstance(path, UrlPath):
        return path.write_bytes(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_many(read: Callable[[StoragePath], T], places: Iterable[StoragePath]) -> Iterator[T]:
    """`read(place)` for each place, in their order, many at a time: storage answers late, but many at once."""
    with ThreadPoolExecutor(N_READERS) as readers:
        yield from readers.map(read, places)


_HINTS = {
    r"NO_SUCH_BUCKET|NOT_FOUND|bucket\W.*not (exist|found)": "there is no such bucket",
    r"denied|forbidden|credential|token|signature|ACCESS_KEY|PERMISSION|UNAUTH|\b40[13]\b": (
        "access is denied: give this machine's environment, configuration or role credentials that may do this"
    ),
    r"NETWORK_CONNECTION|resolve|connect": "nothing answers",
}
_CLOUD = r"AWS Error (\w+) during \w+ operation: ?(.*)|google::cloud::Status\((\w+): .*?message of (.*?)( error_info.*|$)"
_PASSING = r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|UNAVAILABLE|INTERNAL_FAILURE|TIMEOUT|timed out"


def reason(error: Exception) -> str:
    """Why reading or writing failed, in a few words for a person."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    text = re.sub(r" ?\(Request ID.*?\)| Detail: .*", "", text)
    if not (found := re.search(_CLOUD, text)):
        return _cut(text)
    text = ": ".join(filter(None, (found[1] or found[3], found[2] or found[4])))
    hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, text, re.I)), None)
    return f"{hint}; {_cut(text)}" if hint else _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " ..."


def may_pass(error: OSError) -> bool:
    """Whether the same request may succeed in a minute: the network or the storage is out of service, or asks for less traffic."""
    return bool(re.search(_CLOUD, str(error)) and re.search(_PASSING, str(error), re.I))
