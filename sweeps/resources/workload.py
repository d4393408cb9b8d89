"""Measure how many tokens a cell's trials put through the network, from their draws and a sample of each test set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from llmft.config import FileRef, ModelRef, TrialSpec
from llmft.data import Draw, Example
from llmft.methods import Method
from llmft.models import load_tokenizer
from llmft.prompting import DEV, EncodedTrial, encode
from llmft.trial import PreparedTrial, draw_for_trial, encode_prompts, encode_teacher_prompts, prepare_trial, read_text, zero_shot_spec
from sweeps.planning import Cell, Params

SAMPLE, MOST_SEEDS, TEXT_CHARACTERS = 32, 16, 100_000
"""Prompts of a set that are tokenized, draws that are compared, and characters of a text from which its tokens are estimated."""


@dataclass(frozen=True)
class PromptSet:
    """Tokens of a set's prompts behind their common prefix: `n` prompts, of which `sample` holds even quantiles, shortest first."""

    n: int
    sample: tuple[int, ...]

    @property
    def n_tokens(self) -> float:
        return self.n * sum(self.sample) / len(self.sample)


@dataclass(frozen=True)
class ScoredPrompts:
    """Prompts that one network scores: `prefix` tokens (encoded once where `shared`) and `n_virtual_tokens` open each, and up to
    `n_new_tokens` are generated behind it."""

    prefix: int
    sets: tuple[PromptSet, ...]
    shared: bool
    n_virtual_tokens: int = 0
    n_new_tokens: int = 0

    @property
    def n_before(self) -> int:
        """Tokens that each prompt has besides its own."""
        return self.n_virtual_tokens + self.n_new_tokens + (0 if self.shared else self.prefix)

    @property
    def n_tokens(self) -> float:
        return self.prefix * self.shared + sum(prompts.n_tokens + prompts.n * self.n_before for prompts in self.sets)


@dataclass(frozen=True)
class Workload:
    """The heaviest of a cell's trials.

    Attributes:
        spec: with the largest values of its search ranges, and of its seeds the one with the longest draw.
        method: as it has read the spec.
        n_words, n_word_tokens: label words (0 where text is generated), and tokens of all of them.
        shots: tokens of each prompt that is trained on, ascending; empty where nothing is trained.
        completions: tokens of each completion that is trained on, in the order of `shots`; empty for label words.
        n_unlabelled: how many of the examples that are trained on are not shots.
        dev, tests: what is scored.
        teacher: what a teacher reads before each of `n_rounds` rounds of training.
        n_fisher_samples: prompts that are read before the training to estimate the Fisher information.
        tokens_measured: tokens that a reported trial reads to measure forgetting; NaN where lm-evaluation-harness alone knows.
        same_shots: whether all seeds draw the same shots, though they should differ: the training pool holds no others.
    """

    spec: TrialSpec
    method: Method
    n_words: int
    n_word_tokens: int
    shots: tuple[int, ...]
    dev: ScoredPrompts
    tests: ScoredPrompts
    completions: tuple[int, ...] = ()
    n_unlabelled: int = 0
    teacher: tuple[ScoredPrompts, ...] = ()
    n_rounds: int = 1
    n_fisher_samples: int = 0
    tokens_measured: float = 0.0
    same_shots: bool = False

    @property
    def rows_per_query(self) -> int:
        """Rows of a batch that one query takes: one, or one for each label word where some have several tokens."""
        return self.n_words if self.n_words < self.n_word_tokens else 1

    @property
    def tokens_trained(self) -> int:
        """In all epochs of all rounds; `train.patience` may end them earlier."""
        return self.n_rounds * self.spec.train.epochs * sum(self.shots)

    @property
    def tokens_taught(self) -> float:
        """Tokens that the teacher reads, in all rounds."""
        return self.n_rounds * sum(prompts.n_tokens for prompts in self.teacher)

    def tokens_evaluated(self, with_tests: bool) -> float:
        """Tokens of everything that is scored: dev at every evaluation, the test sets once for every checkpoint rule."""
        n_evaluations = self.n_rounds * -(-self.spec.train.epochs // self.spec.train.eval_every_epochs) if self.shots else 1
        tests = len(self.spec.selections) * self.tests.n_tokens if with_tests else 0
        return n_evaluations * self.dev.n_tokens + tests


def largest_workload(cells: Sequence[Cell]) -> Workload:
    """The workload of the heaviest trial of cells that differ in their shots alone.

    Raises:
        UserError: what the spec names cannot be had or does not go together.
        TrialFailure: a prompt does not fit the model.
    """
    cell = max(cells, key=lambda cell: cell.base.n_shots)  # fewer shots are a subset of more
    prepared = prepare_trial(spec := cell.report_spec(_largest_values(cell), 0))
    seeds = sorted({*cell.report_seeds, *(cell.search.seeds if cell.search else ())})[:MOST_SEEDS]
    draws = {
        seed: draw_for_trial(spec.model_copy(update={"data_seed": seed}), prepared.task, prepared.data, prepared.method) for seed in seeds
    }
    shows_examples = not prepared.method.trains or prepared.recipe.teacher is not None

    def n_characters(draw: Draw) -> int:
        sizes = [_n_characters(example) for example in draw.shots]
        return sum(sizes) if shows_examples else max(sizes, default=0)

    longest = max(draws, key=lambda seed: n_characters(draws[seed]))
    spec = spec.model_copy(update={"data_seed": longest})
    prepared = prepare_trial(spec)
    sampled = _sampled(prepared)
    encoded, teacher, words = encode_prompts(spec, sampled), encode_teacher_prompts(spec, sampled), prepared.words
    sizes = {DEV: len(prepared.draw.dev)} | {test.name: len(test.examples) for test in prepared.tests}
    trained = _trained(encoded, encoded.n_new_tokens if teacher else 0, {part.set_name: len(part.examples) for part in prepared.mixture})
    shots = {frozenset(example.id for example in draw.shots) for draw in draws.values()}
    return Workload(
        spec=spec,
        method=prepared.method,
        n_words=len(words.texts) if words else 0,
        n_word_tokens=sum(map(len, words.ids)) if words else 0,
        shots=tuple(length for length, _ in trained),
        completions=tuple(n for _, n in trained) if any(n for _, n in trained) else (),
        n_unlabelled=len(prepared.draw.unlabelled) + sum(len(part.examples) for part in prepared.mixture),
        dev=_scored(encoded, {name: n for name, n in sizes.items() if name == DEV and n}),
        tests=_scored(encoded, {name: n for name, n in sizes.items() if name != DEV}),
        teacher=tuple(
            _scored(prompts, {name: sizes.get(name, len(queries)) for name, queries in prompts.sets.items()}) for prompts in teacher
        ),
        n_rounds=prepared.recipe.teacher.n_rounds if prepared.recipe.teacher else 1,
        n_fisher_samples=prepared.recipe.anchor.n_fisher_samples if prepared.recipe.anchor else 0,
        tokens_measured=_tokens_measured(spec, encoded) if prepared.method.trains and not prepared.method.has_own_head else 0.0,
        same_shots="data" in cell.vary and not spec.demonstrations and bool(prepared.draw.shots) and len(draws) > 1 == len(shots),
    )


def _sampled(prepared: PreparedTrial) -> PreparedTrial:
    """The trial with a sample of each set that is large: dev, the tests and the parts of a mixture."""
    return replace(
        prepared,
        draw=replace(prepared.draw, dev=_sample(prepared.draw.dev)),
        tests=tuple(replace(test, examples=_sample(test.examples)) for test in prepared.tests),
        mixture=tuple(replace(part, examples=_sample(part.examples)) for part in prepared.mixture),
    )


def _sample(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples at even quantiles of their numbers of characters, the longest included."""
    ordered = sorted(examples, key=_n_characters)
    n = min(SAMPLE, len(ordered))
    return tuple(ordered[-(-len(ordered) * (rank + 1) // n) - 1] for rank in range(n))


def _n_characters(example: Example) -> int:
    return sum(map(len, (*example.fields.values(), *example.references[:1])))


def _trained(encoded: EncodedTrial, n_new: int, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """Tokens of each prompt that is trained on, ascending, and of its completion (0 for a label word).

    Args:
        n_new: tokens that a teacher's text takes at the most, which follows each prompt.
        sizes: examples of the sets that are sampled.
    """
    rows: list[tuple[int, int]] = []
    for name in encoded.trained:
        queries, lengths = encoded.sets[name], encoded.lengths(name)
        ends = [len(ids) for ids in queries.completions] or [n_new + 1 if n_new else 0] * len(lengths)
        sample = sorted(zip([length + n_new for length in lengths], ends, strict=True))
        n = sizes.get(name, len(sample))
        rows += [sample[rank * len(sample) // n] for rank in range(n)]
    return sorted(rows)


def _scored(encoded: EncodedTrial, sizes: Mapping[str, int]) -> ScoredPrompts:
    sets = tuple(PromptSet(n, tuple(sorted(map(len, encoded.sets[name].suffixes)))) for name, n in sizes.items())
    return ScoredPrompts(len(encoded.prefix), sets, encoded.shares_prefix, encoded.n_virtual_tokens, encoded.n_new_tokens)


def _tokens_measured(spec: TrialSpec, encoded: EncodedTrial) -> float:
    if (wanted := spec.forgetting) is None:
        return 0.0
    if wanted.harness:
        return math.nan
    n_tokens = _tokens_of_text(spec.model, wanted.text) if wanted.text else 0.0
    for name, data in wanted.tasks.items():
        other = zero_shot_spec(spec.model, name, data, wanted.limit)
        prepared = prepare_trial(other)
        prompts = replace(encode_prompts(other, _sampled(prepared)), n_virtual_tokens=encoded.n_virtual_tokens)
        n_tokens += _scored(prompts, {test.name: len(test.examples) for test in prepared.tests}).n_tokens
    return n_tokens


@lru_cache(maxsize=8)
def _tokens_of_text(ref: ModelRef, text: FileRef) -> float:
    whole = read_text(Path(text.path))
    (ids,) = encode(load_tokenizer(ref), [whole[:TEXT_CHARACTERS]])
    return len(ids) * max(1.0, len(whole) / TEXT_CHARACTERS)


def _largest_values(cell: Cell) -> Params:
    """The largest value that the search may give to each hyper-parameter that is a number; a method's switches are on."""
    largest: Params = {}
    for name, span in cell.ranges.items():
        ends = span.choices or (int(span.high) if span.integer else span.high,)
        numbers = [end for end in ends if isinstance(end, int | float) and (name in cell.base.settings or not isinstance(end, bool))]
        if len(numbers) == len(ends):
            largest[name] = max(ends)
    return largest
