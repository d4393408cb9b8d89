"""Writers of experiment trackers, one class each on the tracker's own package, which is imported when the writer is made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Params = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class LoggedTrial:
    """An ended trial as a tracker takes it.

    Attributes:
        name: of the run; `group` names its cell.
        rows: optimizer step and numbers by name, in the order of the steps; the last row holds the trial's results.
    """

    digest: str
    name: str
    group: str
    params: Params
    rows: tuple[tuple[int, dict[str, float]], ...]
    failed: bool


class Writer(Protocol):
    def log(self, trial: LoggedTrial) -> None:
        """Write one trial as one run."""

    def close(self) -> None:
        """Finish what is still being written."""


class TensorBoardWriter:
    """One folder of event files a trial, below `folder`."""

    def __init__(self, folder: Path, sweep: str):
        self.folder = folder / "tensorboard"

    def log(self, trial: LoggedTrial) -> None:
        from tensorboardX import SummaryWriter

        with SummaryWriter(str(self.folder / trial.name.replace("/", "_"))) as events:
            for step, numbers in trial.rows:
                for name, value in numbers.items():
                    events.add_scalar(name, value, step)
            events.add_text("parameters", "\n".join(f"    {name}: {value}" for name, value in trial.params.items()))

    def close(self) -> None:
        return None


class MLflowWriter:
    """One run a trial in an experiment named after the sweep, in `folder`/mlflow.db unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, folder: Path, sweep: str):
        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or sweep
        known = self.client.get_experiment_by_name(name)
        self.experiment_id = known.experiment_id if known else self.client.create_experiment(name)

    def log(self, trial: LoggedTrial) -> None:
        from mlflow.entities import Metric, Param

        run_id = self.client.create_run(self.experiment_id, run_name=trial.name, tags={"group": trial.group}).info.run_id
        self.client.log_batch(run_id, params=[Param(name, str(value)) for name, value in trial.params.items()])
        now_ms = int(1000 * time.time())
        for step, numbers in trial.rows:  # one request a row: one for each number takes 8 times as long
            self.client.log_batch(run_id, metrics=[Metric(name, float(value), now_ms, step) for name, value in numbers.items()])
        self.client.set_terminated(run_id, "FAILED" if trial.failed else "FINISHED")

    def close(self) -> None:
        return None


class WandbWriter:
    """One run a trial in a project named after the sweep, offline below `folder` unless WANDB_MODE says otherwise."""

    INIT_TIMEOUT_S = 20

    def __init__(self, folder: Path, sweep: str):
        import wandb

        self.folder, self.project = folder, os.environ.get("WANDB_PROJECT") or sweep
        if os.environ["WANDB_MODE"] == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is configured; run `wandb login` first, or unset WANDB_MODE")

    def log(self, trial: LoggedTrial) -> None:
        import wandb

        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=self.INIT_TIMEOUT_S)
        run = wandb.init(
            project=self.project, group=trial.group, name=trial.name, id=trial.digest, config=trial.params, dir=self.folder,
            reinit="create_new", settings=quiet,
        )  # fmt: skip
        for step, numbers in trial.rows:
            run.log(numbers, step=step)
        run.finish(exit_code=int(trial.failed))

    def close(self) -> None:
        import wandb

        wandb.teardown()  # its process may still be writing what has been finished


WRITERS: dict[str, Callable[[Path, str], Writer]] = {
    "tensorboard": TensorBoardWriter, "mlflow": MLflowWriter, "wandb": WandbWriter,
}  # fmt: skip
"""Tracker -> makes its writer, from the folder for its files and the name of the sweep."""
