"""A Ray of our own on this machine.

Its head is a process beside the sweep's: it comes up while the sweep reads its plan and checks its cells, and ends at once. It
ends too when the sweep's process does, however that ends, since it reads from a pipe that is closed then.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import sweeps.ray_backend.settings  # noqa: F401 - the head inherits them
from llmft.errors import UserError
from sweeps.process import gc_paused, uninterrupted
from sweeps.ray_backend.scratch import RAY_FOLDER, end_processes_that_write, scratch_folder
from sweeps.resources import usable_cpus

OBJECT_STORE_BYTES = 100 * 2**20  # specs and digests are all that travels
ERRORS_FILE, WAITS_S, LOOK_EVERY_S = "head.txt", 10.0, 1.0


class OwnRay:
    """Within: there can be a Ray on this machine. It comes up after `start`, and is gone when the context is left.

    Args:
        verbose: show what Ray prints.

    Attributes:
        scratch: the folder of what Ray writes, once it was started.
        credentials: variables without which it lets nobody in, so that no other user of this machine runs code here; none where the
            environment says how Ray is to go about that.
    """

    def __init__(self, verbose: bool = False):
        self.verbose, self.scratch = verbose, Path()
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.credentials = {} if "RAY_AUTH_MODE" in os.environ else own
        self._head: subprocess.Popen[str] | None = None
        self._given: tuple[int, bool] = (0, False)
        self._kept = ExitStack()
        self._address = ""

    def start(self, n_cpus: int = 1, groups: bool = False) -> None:
        """Begin to start it; one that runs already stays, if it is large enough.

        Args:
            n_cpus: that it has at least, real or not.
            groups: whether trials run in groups of workers. Ray Train then needs the dashboard's server: what frees the places of a
                group that was stopped asks it which are left.
        """
        if self._head and n_cpus <= self._given[0] and groups <= self._given[1]:
            return
        self.close()
        self._given = max(usable_cpus(), n_cpus), groups
        self.scratch = self._kept.enter_context(scratch_folder(None))
        settings = {"num_cpus": self._given[0], "include_dashboard": groups, "include_log_monitor": self.verbose}
        # -P: what lies in the working directory may have the name of a module
        command = [sys.executable, "-P", "-m", "sweeps.ray_backend.local_head", str(self.scratch), json.dumps(settings)]
        with open(self.scratch / ERRORS_FILE, "w") as errors:
            self._head = subprocess.Popen(
                command, env=_environment(self.scratch, self.credentials), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=None if self.verbose else errors, text=True, start_new_session=True,
            )  # fmt: skip

    def address(self) -> str:
        """Where it answers; waits until it does.

        Raises:
            UserError: it did not start.
        """
        assert self._head and self._head.stdout
        self._address = self._address or self._head.stdout.readline().strip()
        if not self._address:
            self._head.wait()
            raise UserError(f"Ray did not start on this machine: {self.why_ended()}")
        return self._address

    @property
    def is_started(self) -> bool:
        return self._head is not None

    def why_ended(self) -> str:
        """Why it is there no more though nobody ended it; empty while it is, or where none was started."""
        if self._head is None or (code := self._head.poll()) is None:
            return ""
        if code < 0:
            return f"its process was killed (signal {-code})"
        told = (self.scratch / ERRORS_FILE).read_text(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(told) if line.strip()), "no word why; -v shows what it prints")

    def end(self) -> None:
        """Begin to end it."""
        self._given = (0, False)
        if self._head and self._head.stdin:
            self._head.stdin.close()

    @uninterrupted()
    def close(self) -> None:
        """End it, and wait until it is gone."""
        if self._head:
            self.end()
            try:
                self._head.wait(WAITS_S)
            except subprocess.TimeoutExpired:
                self._head.kill()
                self._head.wait()
            if not self._address:  # the kernel ended what the head had started, but not what that had started
                end_processes_that_write(self.scratch)
            self._head.stdout.close()
        self._head, self._address = None, ""
        self._kept.close()

    def __enter__(self) -> OwnRay:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _environment(scratch: Path, credentials: dict[str, str]) -> dict[str, str]:
    """The head's, and so the workers'."""
    source = str(Path(__file__).parents[2])  # workers import the same code, installed or not
    return {
        **os.environ,
        **credentials,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "RAY_TMPDIR": str(scratch),  # by which processes of this Ray find it, where there are others on the machine
    }


def _be_head(scratch: Path, settings: dict[str, Any]) -> None:
    """Start Ray's processes, say where they answer, and end them when nobody listens any more or one of the two that it cannot do
    without is lost.

    `ray.init` would do, but connects as a driver, for which workers are started that wait in vain, and starts an autoscaler, which
    has nothing to scale.
    """
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is none
    nodes: list[Any] = []

    def leave() -> None:
        sys.stdin.read()
        for node in nodes:
            node.kill_all_processes(check_alive=False, allow_graceful=True)
        os._exit(0)  # where there is none yet, the kernel ends what was started

    threading.Thread(target=leave, daemon=True).start()
    with gc_paused():
        from ray._private.node import Node
        from ray._private.parameter import RayParams
        from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler that ends a job tells all processes; the sweep's decides
    params = RayParams(
        temp_dir=str(scratch / RAY_FOLDER), object_store_memory=OBJECT_STORE_BYTES, dashboard_port=None, no_monitor=True, **settings
    )  # fmt: skip
    nodes.append(node := Node(params, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True))
    (scratch / RAY_FOLDER / "ray_current_cluster").write_text(node.gcs_address)
    with suppress(BrokenPipeError):
        print(node.gcs_address, file=answer, flush=True)
    while not (lost := {kind for kind, _ in node.dead_processes()} & {PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET}):
        time.sleep(LOOK_EVERY_S)
    node.kill_all_processes(check_alive=False, allow_graceful=True)
    print(f"its {' and '.join(sorted(lost))} ended", file=sys.stderr, flush=True)
    os._exit(1)  # the thread that listens would be in the way of an ordinary end


if __name__ == "__main__":
    _be_head(Path(sys.argv[1]), json.loads(sys.argv[2]))
