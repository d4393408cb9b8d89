"""One trial inside a Ray worker. The worker keeps its process, and llmft its base model, from trial to trial."""

from __future__ import annotations

from typing import Any

from ray import tune

from sweeps.parallel import train_loop
from sweeps.store import Store


class TrialTrainable(tune.Trainable):
    """Runs a trial in its only step, and writes its record itself, so that no result can be lost on the way.

    `setup` and `reset_config` must not work or raise: a failure there hangs or fails the sweep.
    """

    n_trials_before = 0

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        import ray.train
        from ray.train.torch import TorchTrainer

        if Store(self.job["root"]).get(self.job["digest"]) is None:
            trainer = TorchTrainer(
                train_loop,
                train_loop_config={**self.job, "n_trials_before": self.n_trials_before},
                scaling_config=ray.train.ScalingConfig(num_workers=0),  # local mode: in this process, without a worker group
                run_config=ray.train.RunConfig(name=self.job["digest"], storage_path=self.job["scratch"]),
            )
            self.n_trials_before += 1
            trainer.fit()
        return {"digest": self.job["digest"], "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None
