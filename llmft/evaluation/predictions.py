"""Predictions of one set: scores of label words, or generated texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from llmft.evaluation.text_metrics import example_scores


@dataclass(frozen=True)
class Predictions:
    """What a method says about a set, in the set's order.

    Attributes:
        labels: [n] gold label indices.
        log_probabilities: [n, labels] under the restricted rule (they sum to one).
        free: [n] best of all words, -1 where it is no label word; None with a classification head.
        rationales: [n], what the model said before its label was read; empty where it was asked for none.
        reached: [n], whether it came to the marker by itself; None without rationales.
    """

    labels: np.ndarray
    log_probabilities: np.ndarray
    free: np.ndarray | None
    rationales: tuple[str, ...] = ()
    reached: np.ndarray | None = None

    @property
    def predicted(self) -> np.ndarray:
        """[n] label indices: the best of the label words, the first of equals."""
        return self.log_probabilities.argmax(1)

    @property
    def score(self) -> float:
        """What selects checkpoints and hyper-parameters, larger is better: the accuracy."""
        return float((self.predicted == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the gold label under the restricted rule, in nats."""
        return float(-self.log_probabilities[np.arange(len(self.labels)), self.labels].mean())

    @property
    def rank(self) -> tuple[float, ...]:
        """What a checkpoint is chosen by: of equal scores the surer."""
        return self.score, -self.loss

    def calibrated(self, content_free: np.ndarray) -> Predictions:
        """Contextual calibration (Zhao et al. 2021, section 5): p becomes diag(p_cf)^-1 p, scaled to a sum of one.

        Only the restricted rule changes; `free` stays the best of all words as the model has it.

        Args:
            content_free: p_cf, [labels], the mean probabilities of the label words for queries without content.
        """
        scaled = self.log_probabilities - np.log(content_free)
        return replace(self, log_probabilities=scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


@dataclass(frozen=True)
class Generated:
    """The texts that a method gives for a set, in the set's order. How probable the references were is not computed.

    Attributes:
        texts: [n].
        references: [n], the texts that count as right.
        finished: [n], whether a text came to its end; the others were cut at the most tokens allowed.
        metric: the score of a text that comparisons are about.
    """

    texts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    finished: np.ndarray
    metric: str
    loss: ClassVar[None] = None

    @cached_property
    def score(self) -> float:
        """What selects checkpoints and hyper-parameters, larger is better: the mean of `metric`."""
        return float(example_scores(self.texts, self.references, (self.metric,))[self.metric].mean())

    @property
    def rank(self) -> tuple[float, ...]:
        """What a checkpoint is chosen by: of equal scores the first."""
        return (self.score,)
