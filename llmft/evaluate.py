"""Predictions: every query of a set scored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from llmft.batches import SHORTEST_PREFIX, Prefix, encode_prefix, make_batch, split_by_tokens
from llmft.errors import Cause, TrialFailure
from llmft.method import Method
from llmft.model import BorrowedModel
from llmft.runtime import Runtime
from llmft.tokens import EncodedQueries, EncodedTrial, LabelWords


@dataclass(frozen=True)
class Predictions:
    """What a method says about a set, in the set's order.

    Attributes:
        labels: [n] gold label indices.
        log_probabilities: [n, labels] under the restricted rule (they sum to one).
        free: [n] best of all words, -1 where it is no label word; None with a classification head.
    """

    labels: np.ndarray
    log_probabilities: np.ndarray
    free: np.ndarray | None

    @property
    def predicted(self) -> np.ndarray:
        """[n] label indices: the best of the label words, the first of equals."""
        return self.log_probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the gold label under the restricted rule, in nats."""
        return float(-self.log_probabilities[np.arange(len(self.labels)), self.labels].mean())


class Evaluator:
    """Scores sets of a trial's prompts with one model; the shared prefix is encoded once and reused while the weights stay.

    Attributes:
        n_tokens: tokens that went through the network so far, padding not counted.
    """

    def __init__(self, method: Method, model: BorrowedModel, encoded: EncodedTrial, words: LabelWords, runtime: Runtime):
        self.method, self.model, self.encoded, self.words, self.runtime = method, model, encoded, words, runtime
        self.n_tokens = 0
        self._prefix: Prefix | None = None

    def predict(self, name: str) -> Predictions:
        """The predictions for the set `name`.

        Raises:
            TrialFailure: a score is NaN (DIVERGED).
        """
        queries = self.encoded.sets[name]
        self.model.network.eval()
        with torch.no_grad(), self.model.autocast():
            return self._predict(queries)

    def _predict(self, queries: EncodedQueries) -> Predictions:
        prefix, opening = self._shared(), self.encoded.prefix
        if prefix:
            opening = ()
        lengths = [len(opening) + len(ids) for ids in queries.suffixes]
        labels, free = np.zeros((len(queries), len(self.words.words)), dtype=np.float32), np.zeros(len(queries), dtype=np.int64)
        is_free = True
        for group in split_by_tokens(lengths, self.runtime.micro_batch_tokens, overhead=prefix.length if prefix else 0):
            scores = self.method.scores(self.model, make_batch(queries, group, self.words, self.model, prefix, opening))
            labels[group] = scores.labels.float().log_softmax(-1).cpu().numpy()
            is_free = scores.free is not None
            if is_free:
                free[group] = scores.free.cpu().numpy()
        self.n_tokens += sum(lengths)
        if not np.isfinite(labels).all():
            raise TrialFailure(
                Cause.DIVERGED,
                f"{int((~np.isfinite(labels)).any(1).sum())} of {len(queries)} queries have a score that is not finite.",
            )
        return Predictions(np.asarray(queries.labels), labels, free if is_free else None)

    def _shared(self) -> Prefix | None:
        if self.method.trains or len(self.encoded.prefix) < SHORTEST_PREFIX:
            return None
        if self._prefix is None:
            self._prefix = encode_prefix(self.model, self.encoded.prefix)
            self.n_tokens += len(self.encoded.prefix)
        return self._prefix

    def predict_all(self, names: list[str]) -> Mapping[str, Predictions]:
        return {name: self.predict(name) for name in names}
