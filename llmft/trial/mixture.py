"""A mixture of tasks that is trained on: which examples of each, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmft.config import Pattern, TrialSpec, pattern_of
from llmft.data import Example, TaskData
from llmft.errors import UserError
from llmft.methods import TaskMixture
from llmft.models import ModelInfo
from llmft.prompting import EncodedTrial, LabelWords, PromptEncoder, resolve_label_words
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


def draw_mixture(spec: TrialSpec, mixture: TaskMixture, pools: Mapping[str, TaskData], info: ModelInfo) -> tuple[Part, ...]:
    """Draw the examples of every task of the spec's mixture, none twice.

    A task's pool is put in a random order that depends on `data_seed` alone, and its examples are the first of it: the same for every
    method, and fewer are a subset of more. The labels have the pool's shares.

    Args:
        pools: the tasks' rows.
        info: of the model that is trained.

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
            words = resolve_label_words(info.tokenizer, pattern, texts, sample, info.is_encoder_decoder)
        elif info.is_encoder_decoder:
            raise UserError(f"mixture: '{name}' generates text, for which causal models alone are trained. Leave it out.")
        order = stream(spec.data_seed, f"mixture/{name}").permutation(len(data.pool))
        examples = tuple(data.pool[i] for i in order[:n])
        parts.append(Part(name, pattern_name, pattern, words, examples, rates[name], len(data.pool)))
    return tuple(parts)


def with_mixture(encoded: EncodedTrial, parts: Sequence[Part], encoder: PromptEncoder) -> EncodedTrial:
    """Add the prompts of every part to `encoded`, each as a further set that is trained on.

    The trial's instruction and demonstrations are of its own task, and do not stand in these prompts.

    Args:
        encoder: the one that gave `encoded`.

    Raises:
        TrialFailure, UserError: as `PromptEncoder.encode`.
    """
    sets, names = dict(encoded.sets), tuple(part.set_name for part in parts)
    for part, name in zip(parts, names, strict=True):
        of_part = replace(encoder, pattern=part.pattern, label_words=part.words, instruction="", marker="", n_new_tokens=1, trained=(name,))
        sets |= of_part.encode((), {name: part.examples}, without_demonstrations=(name,)).sets
    return replace(encoded, sets=sets, trained=(*encoded.trained, *names))
