"""A mixture of tasks that is trained on: which examples of each, and their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmft.config import Pattern, TrialSpec, pattern_of
from llmft.data import Example, TaskData
from llmft.errors import UserError
from llmft.methods import TaskMixture
from llmft.prompting import EncodedTrial, LabelWords, encode_trial, resolve_label_words
from llmft.seeds import stream
from llmft.tasks import load_task


@dataclass(frozen=True)
class Part:
    """One task of a mixture.

    Attributes:
        pattern_name, pattern, words: what its examples are trained in; the words are None where its answers are texts.
        examples: drawn from its training pool, which holds `n_pool`.
        rate: its share of the mixture.
    """

    task: str
    pattern_name: str
    pattern: Pattern
    words: LabelWords | None
    examples: tuple[Example, ...]
    rate: float
    n_pool: int

    @property
    def set_name(self) -> str:
        """Its name among a trial's encoded sets."""
        return f"mixture/{self.task}"


def shares(rates: Sequence[float], n: int) -> list[int]:
    """Share out `n` examples by the rates: whole numbers, those with the largest remainders rounded up so that they sum to `n`."""
    counts = [int(rate * n) for rate in rates]
    by_remainder = sorted(range(len(rates)), key=lambda i: (counts[i] - rates[i] * n, i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def draw_mixture(
    spec: TrialSpec, mixture: TaskMixture, pools: Mapping[str, TaskData], tokenizer: Any, in_decoder: bool
) -> tuple[Part, ...]:
    """Draw the examples of every task of the spec's mixture, none twice.

    A task's pool is put in a random order that depends on `data_seed` alone, and its examples are the first of it: the same for every
    method, and fewer are a subset of more. The labels have the pool's shares.

    Args:
        pools: the tasks' rows.
        in_decoder: whether a decoder of its own says the label words.

    Raises:
        UserError: a task's share is more than its pool holds, or nothing; or one has no words or no texts that this model can say.
    """
    rates = mixture.rates({name: len(data.pool) for name, data in pools.items()})
    counts = shares(list(rates.values()), mixture.n_examples)
    parts = []
    for (name, data), n in zip(pools.items(), counts, strict=True):
        if not n:
            raise UserError(f"n_examples: {mixture.n_examples} leave none for '{name}', whose rate is {rates[name]:.2%}. Use more.")
        if n > len(data.pool):
            raise UserError(
                f"n_examples: the share of '{name}', {n} of {mixture.n_examples}, is more than the {len(data.pool)} that its pool holds. "
                "Use fewer examples, or a lower temperature."
            )
        task, words = load_task(name, spec.mixture[name].definition), None
        pattern_name = pattern_of(task.patterns, spec.pattern)
        pattern = task.patterns[pattern_name]
        if task.kind == "classification":
            texts, sample = task.verbalizers[pattern.verbalizer], data.pool[0].fields
            words = resolve_label_words(tokenizer, pattern, texts, sample, in_decoder)
        elif in_decoder:
            raise UserError(f"mixture: '{name}' generates text, for which causal models alone are trained. Leave it out.")
        order = stream(spec.data_seed, f"mixture/{name}").permutation(len(data.pool))
        examples = tuple(data.pool[i] for i in order[:n])
        parts.append(Part(name, pattern_name, pattern, words, examples, rates[name], len(data.pool)))
    return tuple(parts)


def with_mixture(
    encoded: EncodedTrial, parts: Iterable[Part], tokenizer: Any, separator: str, max_length: int, start: tuple[int, ...]
) -> EncodedTrial:
    """`encoded` with the prompts of every part as a further set that is trained on; the arguments are those of `encode_trial`.

    The trial's instruction and demonstrations are of its own task, and do not stand in these prompts.

    Raises:
        TrialFailure, UserError: as `encode_trial`.
    """
    sets = dict(encoded.sets)
    for part in parts:
        alone = encode_trial(
            tokenizer, part.pattern, part.words, separator, (), {part.set_name: part.examples}, max_length, start=start,
            bare=(part.set_name,), n_virtual_tokens=encoded.n_virtual_tokens, n_new_tokens=1, trained=(part.set_name,),
        )  # fmt: skip
        sets |= alone.sets
    return replace(encoded, sets=sets, trained=(*encoded.trained, *(part.set_name for part in parts)))
