"""A sweep of many short trials on two workers that stay, against starting something for each trial.

    python benchmarks/trials.py [--trials 64] [--sample 6] [--groups 4]

Pattern-based fine-tuning of the toy model, 16 shots, 2 epochs. The other sides run a sample and are scaled up, since each of their
trials costs the same: one process a trial, two at a time (the shell loop of uds-lsv/llmft), and one Ray Train worker group a trial,
two at a time, in a Ray that runs already. All must give the same accuracies. Whole commands are timed, the start of Ray included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

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
    from sweeps.cells import build_cells
    from sweeps.plan import parse_plan

    plan = parse_plan({**TOY, "name": "short", "report": {"seeds": seeds}}, "benchmark")
    return plan, build_cells(plan, "benchmark")


def accuracies(folder: Path) -> dict[int, list]:
    """seed -> what its record says of every set."""
    records = [json.loads(path.read_text()) for path in folder.glob("trials/*/record.json")]
    assert all(record["status"] == "finished" for record in records), records
    return {record["spec"]["data_seed"]: [record["dev_score"], record["metrics"]] for record in records}


def sweep(scratch: Path, n: int) -> dict[int, list]:
    plan = scratch / "short.yaml"
    plan.write_text(yaml.safe_dump({**TOY, "name": "short", "report": {"seeds": list(range(n))}}))
    _llmft("sweep", str(plan), "--workers", str(AT_A_TIME), "--out", str(scratch / "swept"))
    return accuracies(scratch / "swept")


def processes(scratch: Path, n: int) -> dict[int, list]:
    def one(seed: int) -> None:
        sets = [text for name, value in TRAIN.items() for text in ("--set", f"{name}={value}")]
        _llmft(
            "trial", "--method", "pattern", "--model", "toy", "--task", "toy", "--shots", "16", "--seed", str(seed), *sets,
            "--n-dev", "8", "--n-test", "16", "--out", str(scratch / "alone" / str(seed)),  # a folder has one writer
        )  # fmt: skip

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(one, range(n)))
    return {seed: found for folder in (scratch / "alone").iterdir() for seed, found in accuracies(folder).items()}


def groups(scratch: Path, n: int) -> tuple[dict[int, list], float]:
    """The same in worker groups of one process; and how long the trials took, without the start of Ray."""
    from dataclasses import asdict

    from sweeps.session import ray_session  # isort: skip - before Ray

    import ray

    from sweeps.slots import Slot

    _, (cell,) = cells(list(range(n)))
    root = scratch / "groups"

    with ray_session(None, 2 * AT_A_TIME, scratch, False, groups=True):

        @ray.remote(num_cpus=0)
        def one(job):
            import ray.train
            from ray.train.torch import TorchTrainer

            from sweeps.parallel import train_loop

            TorchTrainer(
                train_loop, train_loop_config=job, scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name=job["digest"], storage_path=str(scratch / "train")),
            ).fit()  # fmt: skip

        began, waiting, pending = time.perf_counter(), list(range(n)), []
        while waiting or pending:
            while waiting and len(pending) < AT_A_TIME:
                spec = cell.report_spec({}, waiting.pop(0))
                job = {
                    "root": str(root), "digest": spec.digest, "spec": spec.model_dump_json(), "slot": asdict(Slot(cpus=1)),
                    "n_threads": 1, "run_trial": None, "n_trials_before": 0,
                }  # fmt: skip
                pending.append(one.remote(job))
            done, pending = ray.wait(pending)
            ray.get(done)
        return accuracies(root), time.perf_counter() - began


def _llmft(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sweeps.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--sample", type=int, default=6)
    parser.add_argument("--groups", type=int, default=4)
    arguments = parser.parse_args()
    n = arguments.trials
    table = Table("side", "trials run", "s", f"s for {n}", "ratio", title=f"{n} short trials, {AT_A_TIME} at a time")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        began = time.perf_counter()
        ours = sweep(scratch, n)
        whole_s = time.perf_counter() - began
        table.add_row("llmft sweep", str(n), f"{whole_s:.1f}", f"{whole_s:.0f}", "1.0")
        began = time.perf_counter()
        alone = processes(scratch, arguments.sample)
        sides = [("one process a trial", arguments.sample, alone, time.perf_counter() - began)]
        grouped, grouped_s = groups(scratch, arguments.groups)
        sides.append(("one Ray Train worker group a trial", arguments.groups, grouped, grouped_s))
        for name, n_run, found, seconds in sides:
            scaled = seconds * n / n_run
            table.add_row(name, str(n_run), f"{seconds:.1f}", f"{scaled:.0f}", f"{scaled / whole_s:.1f}")
            assert len(found) == n_run and all(found[seed] == ours[seed] for seed in found), name
    Console(width=110).print(table)
    print(f"the same scores on every set for every seed on all sides; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
