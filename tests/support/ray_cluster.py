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
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def processes_with(variable: str) -> list[int]:
    """Ids of the processes that were started with an environment variable, `NAME=value`, and are alive."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{variable}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone, or someone else's
            continue
    return found


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
        self.environment = os.environ | token | {MARK: str(self.folder)}
        self.options = ["--num-cpus=0", "--num-gpus=0", f"--port={self.address.rpartition(':')[2]}", "--head"]
        self.options += [f"--temp-dir={self.folder}", "--include-dashboard=false", "--disable-usage-stats"]
        if node_types is not None:
            self._describe(node_types, idle_s)

    def _describe(self, node_types: dict[str, dict[str, Any]], idle_s: float) -> None:
        head = {HEAD_TYPE: {"resources": {"CPU": 0}, "max_workers": 0}}
        types = {name: {"node_config": {}, "min_workers": 0, **node} for name, node in (head | node_types).items()}
        empty = ["auth", "docker", "file_mounts"], [
            "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
        ]  # fmt: skip
        config = dict.fromkeys(empty[0], {}) | dict.fromkeys(empty[1], []) | {
            "cluster_name": "test", "max_workers": sum(node["max_workers"] for node in types.values()), "upscaling_speed": 10.0,
            "available_node_types": types, "head_node_type": HEAD_TYPE, "idle_timeout_minutes": idle_s / 60,
            "file_mounts_sync_continuously": False,
            # "fake_multinode" as a type needs a file that Ray's wheel lacks
            "provider": {
                "type": "external", "module": FAKE_PROVIDER, "gcs_address": self.address, "use_node_id_as_ip": True,
                "disable_node_updaters": True, "disable_launch_config_check": True, "launch_multiple": True,
            },
        }  # fmt: skip
        path = self.folder / "autoscaling.yaml"  # JSON is YAML
        path.write_text(json.dumps(config))
        self.options.append(f"--autoscaling-config={path}")
        ids = dict.fromkeys(["RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"], "f" * 51 + "00000")
        self.environment |= ids | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }

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
        for process in processes_with(f"{NODE}={name}"):
            os.kill(process, signal.SIGKILL)

    def drive(self, code: str, *arguments: object, **environment: str) -> subprocess.Popen:
        """Run Python code that connects to the cluster, in a process of its own; `communicate()` gives what it said."""
        return subprocess.Popen(
            [sys.executable, "-c", code, self.address, *map(str, arguments)],
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _start(self, options: list[str], environment: dict[str, str]) -> None:
        ray = Path(sys.executable).parent / "ray"
        done = subprocess.run([str(ray), "start", *options], env=environment, capture_output=True, text=True, timeout=120, cwd=self.folder)
        assert done.returncode == 0, done.stderr or done.stdout

    def processes(self) -> list[int]:
        """Ids of the cluster's processes that are alive."""
        return processes_with(f"{MARK}={self.folder}")

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
