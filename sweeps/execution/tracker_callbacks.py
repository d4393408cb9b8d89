"""Ray's logger callbacks, one function each that sets them up for a sweep; their packages are imported when they are used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.logger import LoggerCallback, TBXLoggerCallback
from ray.tune.result import TRAINING_ITERATION

WANDB_INIT_TIMEOUT_S = 20


class BatchedMLflow(MLflowLoggerCallback):
    """Sends the numbers of a step in one request; Ray's own makes two for every number (8 times as long on SQLite)."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        now_ms, step = int(1000 * time.time()), result[TRAINING_ITERATION]
        numbers = [Metric(name, float(value), now_ms, step) for name, value in result.items() if name != TRAINING_ITERATION]
        MlflowClient(self.tracking_uri).log_batch(self._trial_runs[trial], metrics=numbers)


def _mlflow(folder: Path, sweep: str) -> LoggerCallback:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    return BatchedMLflow(uri, experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME") or sweep)


class WandbRuns(LoggerCallback):
    """Logs to Weights & Biases from this process, offline unless WANDB_MODE says otherwise.

    Ray's own callback starts two Ray processes for every trial: 5 s a trial on two cores, where this takes 0.1 s; and it cannot
    be used without a Ray session.
    """

    def __init__(self, folder: Path, sweep: str):
        self.folder, self.project, self._runs = folder, os.environ.get("WANDB_PROJECT") or sweep, {}

    def setup(self, **info: Any) -> None:
        import wandb

        if os.environ["WANDB_MODE"] == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is configured; run `wandb login` first, or unset WANDB_MODE")

    def log_trial_start(self, trial: Any) -> None:
        import wandb

        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=WANDB_INIT_TIMEOUT_S)
        self._runs[trial] = wandb.init(
            project=self.project, group=trial.experiment_dir_name, name=str(trial), id=trial.trial_id, config=trial.config,
            dir=self.folder, reinit="create_new", settings=quiet,
        )  # fmt: skip

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        numbers = {name: value for name, value in result.items() if name != TRAINING_ITERATION}
        self._runs[trial].log(numbers, step=result[TRAINING_ITERATION])

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._runs.pop(trial).finish(exit_code=int(failed))

    def on_experiment_end(self, trials: list, **info: Any) -> None:
        import wandb

        wandb.teardown()  # its process may still be writing what has been finished


CALLBACKS: dict[str, Callable[[Path, str], LoggerCallback]] = {
    "tensorboard": lambda folder, sweep: TBXLoggerCallback(),
    "mlflow": _mlflow,
    "wandb": WandbRuns,
}
"""Tracker -> makes its callback, from the folder for its files and the name of the sweep."""
