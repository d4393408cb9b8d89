"""The checkpoints that the selections pick during a training, the curve, and the predictions of each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from llmft.config import ORACLES, Selection, TrialSpec
from llmft.evaluation import Evaluator, Generated, Predictions
from llmft.models import shard_of
from llmft.prompting import DEV
from llmft.records import CurvePoint, VirtualToken
from llmft.training.weight_anchor import WeightAnchor


@dataclass
class Checkpoint:
    """A selected state: its step, dev score, and what it predicts on the test sets (filled at once for oracles, else at the end)."""

    step: int
    dev_score: float | None
    dev_loss: float | None
    weights: dict[str, torch.Tensor] | None = None
    predictions: Mapping[str, Predictions | Generated] = field(default_factory=dict)


@dataclass
class TrainingResult:
    """What a trial leaves: the selected checkpoints, the curve, the cost, and what else is worth knowing about the adapted model.

    Attributes:
        first_loss, last_loss: of the first step and, on average, of the last epoch.
        weight_distance: how far the base's weights have moved (`WeightAnchor.distance`).
        virtual_tokens: what the tokens of a learned prompt resemble.
        content_free: the label words' mean probabilities for queries without content, by which scores are calibrated.
    """

    checkpoints: dict[Selection, Checkpoint] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    first_loss: float = math.nan
    last_loss: float = math.nan
    n_tokens: int = 0
    n_steps: int = 0
    n_skipped_steps: int = 0
    weight_distance: dict[Selection, float] = field(default_factory=dict)
    virtual_tokens: list[VirtualToken] = field(default_factory=list)
    content_free: list[float] | None = None


class CheckpointTracker:
    """Evaluates dev (and, for oracles, the test sets) during training and keeps the best states."""

    def __init__(
        self,
        spec: TrialSpec,
        evaluator: Evaluator,
        trainable: Mapping[str, torch.nn.Parameter],
        anchor: WeightAnchor,
        tests: Mapping[str, str],
        result: TrainingResult,
    ):
        self.spec, self.evaluator, self.trainable, self.result = spec, evaluator, trainable, result
        self.anchor, self.names = anchor, list(tests)
        self.in_domain = next((name for name, domain in tests.items() if domain == "in"), None)
        self.out_of_domain = next((name for name, domain in tests.items() if domain == "out"), None)
        self.best: dict[Selection, tuple[float, ...]] = {}
        self.n_since_best = 0  # evaluations of dev in this round

    @property
    def is_out_of_patience(self) -> bool:
        """Whether dev was no better than before for as many evaluations in a row as `train.patience` allows."""
        patience = self.spec.train.patience
        return patience is not None and self.n_since_best >= patience

    def evaluate_and_track(self, epoch: int, train_loss: float, rate: float, last: bool) -> None:
        """Score dev, add a point to the curve, and keep this state for every selection in which it is the best so far."""
        evaluator, result = self.evaluator, self.result
        dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
        score, loss = (dev.score, dev.loss) if dev else (None, None)
        result.curve.append(
            CurvePoint(step=result.n_steps, epoch=epoch, train_loss=train_loss, learning_rate=rate, dev_score=score, dev_loss=loss)
        )
        current = result.checkpoints["last"] = Checkpoint(result.n_steps, score, loss)
        is_best = dev is not None and self._wins("best_dev", dev.rank)
        self.n_since_best = 0 if is_best else self.n_since_best + 1
        if is_best and "best_dev" in self.spec.selections:
            weights = None if last else {name: shard_of(p).to("cpu", copy=True) for name, p in self.trainable.items()}
            result.checkpoints["best_dev"] = current if last else Checkpoint(current.step, score, loss, weights)
        wanted = [oracle for oracle in ORACLES if oracle in self.spec.selections]
        if wanted:
            current.predictions = evaluator.predict_all(self.names)
            for oracle in wanted:
                name = self.in_domain if oracle == "best_in_domain" else self.out_of_domain
                if name and self._wins(oracle, current.predictions[name].rank):
                    result.checkpoints[oracle] = current
                    self._measure(oracle)

    def _measure(self, selection: Selection) -> None:
        self.result.weight_distance[selection] = self.anchor.distance()

    def _wins(self, selection: Selection, score: tuple[float, ...]) -> bool:
        if selection in self.best and score <= self.best[selection]:
            return False
        self.best[selection] = score
        return True

    def finish(self) -> None:
        """Predict the test sets for the checkpoints that have not: the last state as it stands, then the best on dev.

        What stays in the model is the best on dev where that is selected, else the last.
        """
        checkpoints, last = self.result.checkpoints, self.result.checkpoints["last"]
        if "last" not in self.spec.selections:
            del checkpoints["last"]
        else:
            self._measure("last")
            if not last.predictions:
                last.predictions = self.evaluator.predict_all(self.names)
        best = checkpoints.get("best_dev")
        if best is None:
            return
        if best.weights is not None:
            for name, parameter in self.trainable.items():
                shard_of(parameter).copy_(best.weights[name])
            self.evaluator.adapted.reshard()
        best.weights = None
        self._measure("best_dev")
        if not best.predictions:
            best.predictions = self.evaluator.predict_all(self.names)
