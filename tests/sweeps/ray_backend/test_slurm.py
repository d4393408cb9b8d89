"""The Slurm script, with real Ray nodes on this machine and stand-ins for Slurm's own commands."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.ray_cluster import MARK, RayCluster, processes_with

from sweeps.store.store import Store

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[3]

COMMANDS = {
    "srun": """
n=1
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && n=${1#*=}; shift; done
pids=()
for ((i = 0; i < n; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'kill "${pids[@]}"' TERM
for pid in "${pids[@]}"; do while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done; done
""",
    "scontrol": 'echo "$@" >>"$SCONTROL_LOG"\n',
    "llmft": f'exec {sys.executable} -m sweeps.cli "$@"\n',
}


def job_id_with_a_free_port() -> int:
    while True:
        job_id = random.randrange(10_000_000, 20_000_000)
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("0.0.0.0", 20_000 + job_id % 10_000))
            return job_id


class Job:
    """Runs the script as a job of two nodes with one CPU each."""

    def __init__(self, folder: Path):
        self.folder, self.id, commands = folder, job_id_with_a_free_port(), folder / "bin"
        self.requeued, self.scratch = folder / "scontrol", Path(f"/tmp/llmft-{self.id}")
        commands.mkdir()
        for name, body in COMMANDS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (commands / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "SLURM_JOB_ID": str(self.id), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0",
            "SCONTROL_LOG": str(self.requeued), MARK: str(folder),
        }  # fmt: skip

    def start(self, *arguments: object) -> subprocess.Popen:
        command = ["bash", ROOT / "sweeps" / "clusters" / "slurm.sh", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, **pipes)

    def processes(self) -> list[int]:
        return processes_with(f"{MARK}={self.folder}")


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    for process in job.processes():
        os.kill(process, signal.SIGKILL)


@pytest.mark.long
def test_a_job_that_is_told_to_end_queues_again_and_goes_on(job, tmp_path, plan_file, tiny_model):
    plan = plan_file(("seeds: [0, 1, 2]", f"seeds: {list(range(30))}"), model=tiny_model)
    results = tmp_path / "results"
    first = job.start(plan, "--out", results, "--workers", 2)
    RayCluster.wait(lambda: first.poll() is not None or len(list(results.glob("trials/*/record.json"))) > 4, 120, "trials run")
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and job.requeued.read_text() == f"requeue {job.id}\n", said
    assert not job.processes() and not job.scratch.exists()
    n_before = len(Store(results).load())
    second = job.start(plan, "--out", results, "--workers", 2)
    said, _ = second.communicate(timeout=150)
    n_records = len(Store(results).load())
    assert second.returncode == 0 and f"{n_records} trials finished, 0 failed; {n_records - n_before} ran now" in said, said
    assert 4 < n_before < n_records and job.requeued.read_text().count("\n") == 1
    assert not job.processes() and not job.scratch.exists()


def test_a_job_without_ray_ends_at_once(job):
    (job.folder / "bin" / "srun").write_text("#!/bin/sh\necho no nodes >&2; exit 1\n")
    run = job.start("quickstart", "--out", job.folder / "results")
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 1 and "no nodes\n" in said and "llmft: Ray could not be started; see above." in said
    assert not job.requeued.exists() and not job.processes()
