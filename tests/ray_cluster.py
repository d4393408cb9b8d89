"""A Ray cluster of our own on this machine: a head on free ports, nodes in processes of their own, all ended by their ids."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK, NODE = "LLMFT_TEST_CLUSTER", "LLMFT_TEST_NODE"
"""Environment variables that every process of a cluster, and of a node of it, inherits, and by which they are found."""

HEAD_TYPE = "ray.head.default"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class RayCluster:
    """A head without CPUs while the block lasts, and nodes that are added by hand or come when trials wait.

    Args:
        node_types: name -> {"resources": ..., "max_workers": ...} of nodes that Ray's autoscaler starts from zero and ends when
            they were idle for `idle_s`; their GPUs are numbers only. None: no autoscaler.
    """

    def __init__(self, node_types: dict[str, dict[str, Any]] | None = None, idle_s: float = 5.0):
        self.folder = Path(tempfile.mkdtemp(prefix="llmft-tc-", dir="/tmp"))  # a short path: sockets lie in it
        self.address = f"127.0.0.1:{free_port()}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nobody's ~/.ray/auth_token has a say
        self.environment = os.environ | token | {MARK: str(self.folder), "RAY_enable_autoscaler_v2": "0"}
        self.options = ["--num-cpus=0", "--num-gpus=0", f"--port={self.address.rpartition(':')[2]}", "--head"]
        self.options += [f"--temp-dir={self.folder}", "--include-dashboard=false", "--disable-usage-stats"]
        if node_types is not None:
            self._describe(node_types, idle_s)

    def _describe(self, node_types: dict[str, dict[str, Any]], idle_s: float) -> None:
        head = {HEAD_TYPE: {"resources": {"CPU": 0}, "max_workers": 0}}
        types = {name: {"node_config": {}, "min_workers": 0, **node} for name, node in (head | node_types).items()}
        lists = "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands"
        config = {
            "cluster_name": "test", "max_workers": sum(node["max_workers"] for node in types.values()), "auth": {}, "docker": {},
            "provider": {
                "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                "disable_launch_config_check": True, "launch_multiple": True, "gcs_address": self.address,
            },
            "available_node_types": types, "head_node_type": HEAD_TYPE, "upscaling_speed": 10.0, "file_mounts": {},
            "idle_timeout_minutes": idle_s / 60, **dict.fromkeys([*lists.split(), "worker_start_ray_commands"], []),
            **dict.fromkeys(["cluster_synced_files", "rsync_exclude", "rsync_filter"], []), "file_mounts_sync_continuously": False,
        }  # fmt: skip
        path = self.folder / "autoscaling.yaml"  # JSON is YAML
        path.write_text(json.dumps(config))
        self.options.append(f"--autoscaling-config={path}")
        self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

    def __enter__(self) -> RayCluster:
        try:
            self._start(self.options, self.environment)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes():
                try:
                    os.kill(process, wanted)
                except ProcessLookupError:
                    continue
            self.wait(lambda: not self.processes(), timeout_s=3, what=None)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not self.processes()

    def add_node(self, name: str, n_cpus: int = 1, **environment: str) -> None:
        """Start a node whose processes see `environment`."""
        options = [f"--address={self.address}", f"--num-cpus={n_cpus}", "--num-gpus=0"]
        self._start(options, self.environment | environment | {NODE: name})

    def kill_node(self, name: str) -> None:
        """End every process of a node at once, as when its machine is taken away."""
        for process in self.processes(f"{NODE}={name}"):
            os.kill(process, signal.SIGKILL)

    def drive(self, code: str, *arguments: object, **environment: str) -> subprocess.Popen:
        """Run Python code that connects to the cluster, in a process of its own; `communicate()` gives what it said."""
        return subprocess.Popen(
            [sys.executable, "-c", code, self.address, *map(str, arguments)],
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _start(self, options: list[str], environment: dict[str, str]) -> None:
        ray = Path(sys.executable).parent / "ray"
        done = subprocess.run(
            [str(ray), "start", *options], env=environment, capture_output=True, text=True, timeout=120, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr or done.stdout

    def processes(self, variable: str | None = None) -> list[int]:
        """Ids of the cluster's processes that are alive; of those with an environment variable (`NAME=value`) only."""
        wanted, found = f"{variable or f'{MARK}={self.folder}'}\0".encode(), []
        for folder in Path("/proc").iterdir():
            try:
                mine = folder.name.isdigit() and wanted in (folder / "environ").read_bytes()
            except OSError:  # gone, or someone else's
                continue
            if mine:
                found.append(int(folder.name))
        return found

    def n_nodes(self) -> int:
        """Nodes that are alive, the head not counted."""
        n = 0
        for process in self.processes():
            try:
                n += Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet")
            except OSError:
                continue
        return n - 1

    @staticmethod
    def wait(until: Any, timeout_s: float, what: str | None) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline:
                assert what is None, f"not within {timeout_s} s: {what}"
                return
            time.sleep(0.1)
