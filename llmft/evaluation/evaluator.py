"""Predictions: every query of a set scored, or answered with a text, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from llmft.errors import Cause, TrialFailure
from llmft.evaluation.predictions import Generated, Predictions
from llmft.models import (
    AdaptedModel,
    LoadedModel,
    Prefix,
    QueryBatch,
    batch_by_tokens,
    encode_shared,
    end_tokens,
    generate,
    make_batch,
    scoring_budget,
    shard_batches,
)
from llmft.prompting import CONTENT_FREE, Decoding, EncodedQueries, EncodedTrial, LabelWords, RationaleDecoding
from llmft.runtime import Runtime

Result = TypeVar("Result")


class Evaluator:
    """Scores sets of a trial's prompts with one model, or answers them where text is generated; the shared prefix is encoded once
    and reused while the weights stay.

    Attributes:
        n_tokens: tokens that went through the networks of all processes so far, padding of prompts not counted.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        encoded: EncodedTrial,
        words: LabelWords | None,
        runtime: Runtime,
        decoding: Decoding | None = None,
        reasoning: RationaleDecoding | None = None,
    ):
        self.adapted, self.encoded, self.words, self.runtime, self.decoding = adapted, encoded, words, runtime, decoding
        self.reasoning = reasoning
        self.n_tokens = 0
        self._prefix: Prefix | None = None
        self._content_free: np.ndarray | None = None

    def predict(self, name: str) -> Predictions | Generated:
        """The predictions for the set `name`, shared out over the processes and gathered in each.

        Raises:
            TrialFailure: a score is NaN (DIVERGED), or the time is over (TIMEOUT).
        """
        self.adapted.network.eval()
        with torch.no_grad():
            if self.decoding:
                return self._generate(self.encoded.sets[name], self.decoding)
            if self.reasoning:
                return self._reason(self.encoded.sets[name], self.reasoning)
            found = self._predict(self.encoded.sets[name])
            return found if self.content_free is None else found.calibrated(self.content_free)

    @property
    def content_free(self) -> np.ndarray | None:
        """[labels], the mean restricted probabilities for the content-free queries; None where scores are not calibrated."""
        if CONTENT_FREE in self.encoded.sets and self._content_free is None:
            with torch.no_grad():
                found = self._predict(self.encoded.sets[CONTENT_FREE])
            self._content_free = np.exp(found.log_probabilities.astype(np.float64)).mean(0)
        return self._content_free

    def every(self, name: str) -> Iterator[QueryBatch]:
        """The set `name` in batches, all of it in every process."""
        encoded, model = self.encoded, self.adapted.model
        for group in batch_by_tokens(encoded.lengths(name), self.runtime.micro_batch_tokens):
            yield make_batch(encoded.sets[name], group, self.words, model, prefix_ids=encoded.prefix_of(name))

    def _predict(self, queries: EncodedQueries) -> Predictions:
        labels, free = torch.zeros(len(queries), len(self.words.texts)), torch.zeros(len(queries), dtype=torch.int64)
        is_free = True
        for group, counts, scores in self._each(self.adapted.method.scores, queries):
            is_free = scores.full_vocab is not None
            if counts:
                labels[group] = scores.labels.float().log_softmax(-1).cpu()
                if is_free:
                    free[group] = scores.full_vocab.cpu()
        labels, free = self._gathered(labels), self._gathered(free)
        return Predictions(np.asarray(queries.labels), labels.numpy(), free.numpy() if is_free else None)

    def read_targets(self, name: str, targets_of: Callable[[LoadedModel, QueryBatch], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Compute `targets_of` for every query of the set `name`, in the set's order, on the CPU.

        Raises:
            TrialFailure: one is not finite (DIVERGED), or the time is over (TIMEOUT).
        """
        self.adapted.network.eval()
        queries, found = self.encoded.sets[name], {}

        def keep(group: list[int], counts: bool, targets: dict[str, torch.Tensor]) -> None:
            for key, rows in targets.items():
                if key not in found:
                    found[key] = torch.zeros(len(queries), *rows.shape[1:], dtype=rows.dtype)
                if counts:
                    found[key][group] = rows.cpu()

        with torch.no_grad():
            for group, counts, targets in self._each(targets_of, queries):
                keep(group, counts, targets)
                targets.clear()  # they are not to be there during the next pass
        return {key: self._gathered(whole) for key, whole in found.items()}

    def _each(
        self, compute: Callable[[LoadedModel, QueryBatch], Result], queries: EncodedQueries
    ) -> Iterator[tuple[list[int], bool, Result]]:
        """Compute this process's share of the queries, batch by batch; gives their positions, whether they count, and the result."""
        runtime, prefix, opening = self.runtime, self._shared(), self.encoded.prefix
        if prefix:
            opening = ()
        before = len(opening) + self.encoded.n_virtual_tokens
        lengths = [before + len(ids) for ids in queries.suffixes]
        budget, overhead = scoring_budget(runtime.micro_batch_tokens, prefix)
        groups = shard_batches(lengths, budget, runtime.rank, runtime.world_size, overhead)
        for group, counts in groups:
            runtime.check_time()
            batch = make_batch(queries, group, self.words, self.adapted.model, prefix, opening)
            yield group, counts, self.adapted(compute, batch)
        self.n_tokens += sum(lengths)

    def _gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """The rows of all processes; `mine` are zero but where a query was this process's."""
        rows = self.runtime.all_reduce(mine, "sum")
        if not (finite := rows.isfinite().flatten(1).all(1) if rows.ndim > 1 else rows.isfinite()).all():
            raise TrialFailure(Cause.DIVERGED, f"{int((~finite).sum())} of {len(rows)} queries have a score that is not finite.")
        return rows

    def _generate(self, queries: EncodedQueries, decoding: Decoding) -> Generated:
        ends = end_tokens(self.adapted.model, decoding)
        texts, finished = zip(*(decoding.read(ids, ends) for ids in self._new_tokens(queries, decoding)), strict=True)
        return Generated(texts, queries.references, np.asarray(finished), decoding.metric)

    def _reason(self, queries: EncodedQueries, reasoning: RationaleDecoding) -> Predictions:
        ends = end_tokens(self.adapted.model, reasoning.decoding)
        said = [reasoning.read(ids, ends) for ids in self._new_tokens(queries, reasoning.decoding)]
        rationales, reached = zip(*said, strict=True)
        found = self._predict(reasoning.followed(queries, rationales, len(self.encoded.prefix) + self.encoded.n_virtual_tokens))
        return replace(found, rationales=rationales, reached=np.asarray(reached))

    def _new_tokens(self, queries: EncodedQueries, decoding: Decoding) -> list[list[int]]:
        """The ids that follow each query; behind an output's end anything may stand."""
        runtime, prefix, opening = self.runtime, self._shared(), self.encoded.prefix
        if prefix:
            opening = ()
        before, n_new = len(opening) + self.encoded.n_virtual_tokens, decoding.spec.max_new_tokens
        lengths = [before + len(ids) for ids in queries.suffixes]
        overhead = n_new + (prefix.length if prefix else 0)
        budget = runtime.micro_batch_tokens // decoding.spec.num_beams
        ids = torch.zeros(len(queries), n_new, dtype=torch.int64)
        widths = torch.zeros(len(queries), dtype=torch.int64)
        for group, counts in shard_batches(lengths, budget, runtime.rank, runtime.world_size, overhead):
            runtime.check_time()
            batch = make_batch(queries, group, None, self.adapted.model, prefix, opening)
            new = self.adapted(generate, batch, decoding).cpu()
            if counts:
                ids[group, : new.shape[1]], widths[group] = new, new.shape[1]
        ids, widths = (runtime.all_reduce(mine, "sum").tolist() for mine in (ids, widths))  # zero but where a query was mine
        self.n_tokens += sum(lengths) + sum(widths)
        return [row[:n] for row, n in zip(ids, widths, strict=True)]

    def _shared(self) -> Prefix | None:
        if not self.encoded.shares_prefix:
            return None
        if (self.decoding or self.reasoning) and getattr(self.adapted.network.config, "sliding_window", None):
            return None  # padding between prefix and query would count as distance
        if self._prefix is None or self.adapted.method.trains:  # weights that move make another of it
            prefix = self.adapted(encode_shared, self.encoded.prefix)
            in_all = not self.runtime.largest(not prefix.is_shared)  # or the processes would have unlike batches
            self._prefix = replace(prefix, is_shared=in_all)
            self.n_tokens += len(self.encoded.prefix) * self.runtime.world_size
        return self._prefix

    def predict_all(self, names: list[str]) -> Mapping[str, Predictions | Generated]:
        return {name: self.predict(name) for name in names}
