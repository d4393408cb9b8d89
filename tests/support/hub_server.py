"""A server that speaks as much of the hub's protocol as its client needs to fetch models and data sets, and counts the requests.

As on the hub, small files come from `resolve/`, large ones by a redirect to another path, and a gated repository tells its commit
and files to anyone but gives none of them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".msgpack", ".h5")


@dataclass
class Repository:
    """`commits`: commit -> path -> content; `branches`: name -> commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer(ThreadingHTTPServer):
    """Serves `repositories` while its block lasts.

    Attributes:
        asked: how often each "METHOD path" was asked for.
        cut: a file in the middle of which the server stops for good.
        held: files of that name are sent only when `go` is set.
        delay_s: time that every answer takes.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: Counter[str] = Counter()
        self.cut: str | None = None
        self.held: str | None = None
        self.go = threading.Event()
        self.delay_s = 0.0
        self.counting = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def push(self, name: str, files: dict[str, bytes], branch: str = "main", gated: bool = False) -> str:
        """A new commit on a branch; `name` begins with `datasets/` for a data set."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit], repository.gated = files, gated
        repository.branches[branch] = commit
        return commit

    def push_folder(self, name: str, folder: Path | str, **extra: bytes) -> str:
        return self.push(name, {path.name: path.read_bytes() for path in Path(folder).iterdir()} | extra)

    def n_fetched(self) -> dict[str, int]:
        """File name -> how often its content was sent."""
        sent = {what: n for what, n in self.asked.items() if what.startswith("GET ") and "/api/" not in what}
        return {what.rsplit("/", 1)[1]: n for what, n in sent.items()}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        what = f"{self.command} /{'/'.join(parts)}"
        redirected = parts[0] == "cdn"
        parts = parts[parts[0] in ("cdn", "api") :]
        prefix = "datasets/" if parts[0] == "datasets" else ""
        parts = parts[parts[0] in ("models", "datasets") :]
        if len(parts) < 3:  # of no repository: the client also asks for news of itself
            return self._send(404, b"", {})
        name, (verb, *rest) = prefix + "/".join(parts[:2]), parts[2:]
        with self.server.counting:
            self.server.asked[what] += 1
        time.sleep(self.server.delay_s)
        if self.command == "GET" and parts[-1] == self.server.held:
            self.server.go.wait(60)
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        commit = repository.branches.get(rest[0], rest[0])
        if commit not in repository.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if verb == "revision":
            return self._send_json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        if verb == "tree":
            return self._send_json([_entry(path, content) for path, content in files.items()])
        if repository.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        self._send_file(name, commit, "/".join(rest[1:]), redirected)

    def _send_file(self, name: str, commit: str, path: str, redirected: bool) -> None:
        content = self.server.repositories[name].commits[commit].get(path)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        head = {"ETag": f'"{_entry(path, content)["oid"]}"', "X-Repo-Commit": commit}
        if path.endswith(LARGE) and not redirected:
            large = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", head | large | {"Location": f"{self.server.address}/cdn/{name}/resolve/{commit}/{path}"})
        self._send(200, content, head, cut=self.command == "GET" and path == self.server.cut)

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.server.stop()


def _entry(path: str, content: bytes) -> dict[str, object]:
    """A line of the listing; `oid` is git's hash of the file, or of the pointer that stands for a large one."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    if path.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
