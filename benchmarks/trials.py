"""A sweep of many short trials on two workers that stay, against starting something for each trial.

    python benchmarks/trials.py [--trials 64] [--sample 8] [--groups 4] [--repeats 3]

Pattern-based fine-tuning of the toy model, 16 shots, 2 epochs. The other sides run a sample and are scaled up, since each of their
trials costs the same: one process a trial, two at a time (the shell loop of uds-lsv/llmft), and one Ray Train worker group a trial,
two at a time, in a Ray that runs already. All must give the same accuracies. Whole commands are timed; of ours, the start of Ray and
the report count too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import yaml
from pairs import Side, Timed, measure

TRAIN = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
TOY = {
    "models": ["toy"],
    "tasks": ["toy"],
    "methods": {"pattern": None},
    "n_shots": [16],
    "train": TRAIN,
    "n_dev": 8,
    "n_test": 16,
}
AT_A_TIME = 2


def cells(seeds: list[int]):
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import parse_plan

    plan = parse_plan({**TOY, "name": "short", "report": {"seeds": seeds}}, "benchmark")
    return plan, build_cells(plan, "benchmark")


def accuracies(folder: Path) -> dict[int, list]:
    """seed -> what its record says of every set."""
    records = [json.loads(path.read_text()) for path in folder.glob("trials/*/record.json")]
    assert all(record["status"] == "finished" for record in records), records
    return {record["spec"]["data_seed"]: [record["dev_score"], record["metrics"]] for record in records}


def sweep(n: int) -> dict[int, list]:
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "short.yaml"
        plan.write_text(yaml.safe_dump({**TOY, "name": "short", "report": {"seeds": list(range(n))}}))
        _llmft("sweep", str(plan), "--workers", str(AT_A_TIME), "--out", str(Path(folder) / "swept"))
        return accuracies(Path(folder) / "swept")


def processes(n: int) -> dict[int, list]:
    def one(scratch: Path, seed: int) -> None:
        sets = [text for name, value in TRAIN.items() for text in ("--set", f"train.{name}={value}")]
        _llmft(
            "trial", "--method", "pattern", "--model", "toy", "--task", "toy", "--shots", "16", "--seed", str(seed), *sets,
            "--set", "n_dev=8", "--set", "n_test=16", "--out", str(scratch / str(seed)),  # a folder has one writer
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(partial(one, Path(folder)), range(n)))
        return {seed: found for part in Path(folder).iterdir() for seed, found in accuracies(part).items()}


def groups(n: int) -> tuple[dict[int, list], float, float]:
    """The same in worker groups of one process; and how long the trials took, without the start of Ray."""
    with tempfile.TemporaryDirectory() as folder:
        return _groups(Path(folder), n)


def _groups(scratch: Path, n: int) -> tuple[dict[int, list], float, float]:
    from dataclasses import asdict

    from sweeps.ray_backend.session import ray_session  # isort: skip - before Ray

    import ray

    from sweeps.resources.slots import ResourceRequest

    _, (cell,) = cells(list(range(n)))
    root = scratch / "groups"

    with ray_session(None, n_cpus=2 * AT_A_TIME, groups=True):

        @ray.remote(num_cpus=0)
        def one(job):
            import ray.train
            from ray.train.torch import TorchTrainer

            from sweeps.ray_backend.worker_group import train_loop

            TorchTrainer(
                train_loop, train_loop_config=job, scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name=job["digest"], storage_path=str(scratch / "train")),
            ).fit()  # fmt: skip

        began, waiting, pending = time.perf_counter(), list(range(n)), []
        while waiting or pending:
            while waiting and len(pending) < AT_A_TIME:
                spec = cell.report_spec({}, waiting.pop(0))
                job = {
                    "root": str(root), "digest": spec.digest, "spec": spec.model_dump_json(), "slot": asdict(ResourceRequest(cpus=1)),
                    "n_threads": 1, "run_trial": None, "n_trials_before": 0,
                }  # fmt: skip
                pending.append(one.remote(job))
            done, pending = ray.wait(pending)
            ray.get(done)
        return accuracies(root), time.perf_counter() - began, 0.0


def _llmft(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sweeps.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    n = arguments.trials
    ours = Side("llmft sweep", partial(sweep, n))
    others = [
        Side("one process a trial", partial(processes, arguments.sample), n / arguments.sample),
        Timed("one Ray Train worker group a trial", partial(groups, arguments.groups), n / arguments.groups),
    ]
    measure(ours, others, arguments.repeats, f"{n} short trials, {AT_A_TIME} at a time", in_process=False)
    for side in others:
        assert side.found and all(side.found[seed] == ours.found[seed] for seed in side.found), side.name
    print("the same scores on every set for every seed on all sides")


if __name__ == "__main__":
    main()
