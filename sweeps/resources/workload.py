"""What a cell's trials put through the network: how long their prompts are, from the very draws and a sample of the test sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from llmft.config import ORACLES, FileRef, ModelRef, TrialSpec
from llmft.data import Example
from llmft.methods import Method
from llmft.models import load_tokenizer
from llmft.prompting import DEV, EncodedTrial, LabelWords, encode
from llmft.trial import (
    PreparedTrial,
    encode_dev_alone,
    encode_prompts,
    encode_teacher_prompts,
    prepare_trial,
    read_text,
    zero_shot_spec,
)
from sweeps.planning import Cell, Params

SAMPLE, MOST_SEEDS = 48, 16
"""Prompts of a test set that are tokenised: the longest, the shortest and some evenly between; and draws that are looked at."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a set's prompts behind the common prefix: `n` prompts, of which `sample` holds even quantiles, shortest first."""

    n: int
    sample: tuple[int, ...]

    @property
    def n_tokens(self) -> float:
        return self.n * sum(self.sample) / len(self.sample)

    def batches(self, budget: int, opening: int) -> list[tuple[int, int]]:
        """(prompts, tokens of each with its `opening`) of the batches under a budget of tokens, the longest prompts first."""
        shapes, left, step = [], self.n, self.n / len(self.sample)
        while left:
            length = opening + self.sample[math.ceil(left / step) - 1]
            shapes.append((max(1, min(left, budget // length)), length))
            left -= shapes[-1][0]
        return shapes


@dataclass(frozen=True)
class Reading:
    """Prompts that are scored behind one opening of `prefix` tokens, which is encoded once if `shared`, and virtual tokens; where text
    is generated, up to `n_new_tokens` follow each."""

    prefix: int
    sets: tuple[Lengths, ...]
    shared: bool
    n_virtual_tokens: int = 0
    n_new_tokens: int = 0

    def largest_batches(self, budget: int, overhead: int) -> set[tuple[int, int]]:
        """(prompts, tokens of each with its `overhead` and what is generated) of the batches that may need the most: the longest, and
        the most prompts.

        Args:
            budget, overhead: from `llmft.models.batches.scoring_budget`.
        """
        opening = overhead + self.n_virtual_tokens + self.n_new_tokens + (0 if self.shared else self.prefix)
        shapes = [shape for lengths in self.sets for shape in lengths.batches(budget, opening)]
        return {max(shapes), max(shapes, key=lambda shape: shape[::-1]), max(shapes, key=lambda shape: shape[0] * shape[1])}

    @property
    def n_tokens(self) -> float:
        opening = self.n_virtual_tokens + self.n_new_tokens + (0 if self.shared else self.prefix)
        return self.prefix * self.shared + sum(lengths.n_tokens + lengths.n * opening for lengths in self.sets)


@dataclass(frozen=True)
class Workload:
    """The heaviest of a cell's trials.

    Attributes:
        spec: with the values of its search ranges that need the most, and of its seeds the one with the longest draw.
        words, start: the label words (None where text is generated), and what a decoder of its own reads before them.
        prefix: tokens that open every scored prompt: the demonstrations, and what their pattern begins with.
        n_virtual_tokens: places that the method takes in front of every prompt.
        shares_prefix: whether the prefix is encoded once, and its keys and values kept (`llmft.evaluation.evaluator.Evaluator`).
        shots: places of each whole prompt that is trained on, shortest first; empty where nothing is trained.
        completions: how many of them (and the last, which is not fed) are trained to be said; empty for classification.
        dev, tests: what is scored besides.
        n_new_tokens: tokens that are generated for each of them at the most.
        lessons: what a teacher reads before the training; `teacher_start` is its decoder's `start`.
        n_rounds, lessons_again: how often is trained, and what the student reads each time in between.
        n_unlabelled: how many of the examples that are trained on are not shots.
        n_fisher_samples: samples of an EWC penalty's Fisher information.
        tokens_measured: tokens of what a reported trial measures of forgetting, with the adapted model (the base's own numbers are there
            once for a process); NaN where lm-evaluation-harness, which must be asked for its data, knows how many.
        same_shots: whether all seeds draw the same shots, though they should differ: the training pool holds no others.
    """

    spec: TrialSpec
    words: LabelWords | None
    prefix: int
    n_virtual_tokens: int
    shares_prefix: bool
    shots: tuple[int, ...]
    dev: Lengths | None
    tests: Mapping[str, Lengths]
    lessons: tuple[Reading, ...] = ()
    n_unlabelled: int = 0
    start: tuple[int, ...] = ()
    n_new_tokens: int = 0
    completions: tuple[int, ...] = ()
    teacher_start: tuple[int, ...] = ()
    n_rounds: int = 1
    lessons_again: tuple[Reading, ...] = ()
    same_shots: bool = False
    n_fisher_samples: int = 0
    tokens_measured: float = 0.0

    @property
    def scored(self) -> Reading:
        sets = (*filter(None, [self.dev]), *self.tests.values())
        return Reading(self.prefix, sets, self.shares_prefix, self.n_virtual_tokens, self.n_new_tokens)

    @property
    def looks(self) -> tuple[Reading, ...]:
        """What is scored in the course of the training: dev, and for oracles everything."""
        if not self.shots or not self.dev:
            return ()
        return (self.scored if set(ORACLES) & set(self.spec.selections) else replace(self.scored, sets=(self.dev,)),)

    @property
    def tokens_taught(self) -> float:
        """Tokens that the teacher reads, in all rounds."""
        again = sum(lesson.n_tokens for lesson in self.lessons_again)
        return sum(lesson.n_tokens for lesson in self.lessons) + (self.n_rounds - 1) * again

    @property
    def tokens_trained(self) -> int:
        """In all epochs of all rounds; `train.patience` may end them earlier."""
        return self.n_rounds * self.spec.train.epochs * sum(self.shots)

    @property
    def tokens_weighed(self) -> float:
        """Tokens that are read forward and backward before the training, to know what each weight counts."""
        return self.n_fisher_samples * sum(self.shots) / max(1, len(self.shots))

    def tokens_evaluated(self, with_tests: bool) -> float:
        """Tokens of everything that is scored: dev at every look, the test sets once for every checkpoint rule."""
        looks = self.n_rounds * -(-self.spec.train.epochs // self.spec.train.eval_every_epochs) if self.shots else 1
        sets = [(looks, self.dev)] if self.dev else []
        sets += [(len(self.spec.selections), lengths) for lengths in self.tests.values()] if with_tests else []
        opening = self.n_virtual_tokens + self.n_new_tokens + (0 if self.shares_prefix else self.prefix)
        return sum(times * (lengths.n_tokens + lengths.n * opening) for times, lengths in sets)


def heaviest(cells: Sequence[Cell]) -> Workload:
    """The heaviest trial of cells that differ in their shots alone.

    Raises:
        UserError: what the spec names cannot be had or does not go together.
        TrialFailure: a prompt does not fit the model.
    """
    cell = max(cells, key=lambda cell: cell.base.n_shots)  # fewer shots are a subset of more
    spec = cell.report_spec(_largest(cell), 0)
    seeds = sorted({*cell.report_seeds, *(cell.search.seeds if cell.search else ())})[:MOST_SEEDS]
    trials = [prepare_trial(spec.model_copy(update={"data_seed": seed})) for seed in seeds]

    def weight(trial: PreparedTrial) -> int:
        shown = [*trial.recipe.prompting.demonstrations]
        if trial.recipe.teacher:
            shown += trial.recipe.teacher.prompts[0].demonstrations
        return sum(map(_n_characters, shown)) or max(map(_n_characters, trial.draw.shots), default=0)

    setting = max(trials, key=weight)
    method, recipe, longest = setting.method, setting.recipe, setting.draw
    n_different = len({frozenset(example.id for example in trial.draw.shots) for trial in trials})
    sampled = replace(
        setting,
        draw=replace(longest, dev=_sample(longest.dev)),
        tests=tuple(replace(test, examples=_sample(test.examples)) for test in setting.tests),
    )
    encoded = encode_prompts(spec, sampled)
    lessons = encode_teacher_prompts(spec, sampled)
    untouched = [*(replace(lesson, n_virtual_tokens=0) for lesson in lessons), *_alone(spec, sampled, encoded, bool(lessons))]
    lengths = {name: tuple(sorted(queries.lengths)) for name, queries in encoded.sets.items()}
    by_length, says_texts = _trained(encoded, bool(lessons))
    return Workload(
        spec,
        setting.words,
        len(encoded.prefix),
        encoded.n_virtual_tokens,
        encoded.shares_prefix,
        tuple(n for n, _ in by_length),
        Lengths(len(longest.dev), lengths[DEV]) if longest.dev else None,
        {test.name: Lengths(len(test.examples), lengths[test.name]) for test in setting.tests},
        tuple(_reading(prompts, len(longest.dev)) for prompts in untouched),
        len(longest.unlabelled) + (recipe.mixture.n_examples if recipe.mixture else 0),
        setting.start,
        encoded.n_new_tokens,
        tuple(n for _, n in by_length) if says_texts else (),
        next((queries.start for lesson in lessons for queries in lesson.sets.values()), ()),
        recipe.teacher.n_rounds if recipe.teacher else 1,
        tuple(_reading(lesson, len(longest.dev)) for lesson in lessons) if recipe.teacher and recipe.teacher.n_rounds > 1 else (),
        "data" in cell.vary and not spec.demonstrations and bool(longest.shots) and len(trials) > 1 and n_different == 1,
        recipe.anchor.n_fisher_samples if recipe.anchor else 0,
        _tokens_measured(spec, method, encoded.n_virtual_tokens),
    )


def _trained(encoded: EncodedTrial, taught: bool) -> tuple[list[tuple[int, int]], bool]:
    """The places of each prompt that is trained on, and how many tokens of them (and one more) are trained to be said, in order;
    and whether any of them are texts.

    What a teacher will say is taken to be as long as it may be.
    """
    found: list[tuple[int, int]] = []
    n_new = encoded.n_new_tokens if taught else 0
    for name in encoded.trained:
        queries, lengths = encoded.sets[name], encoded.lengths(name)
        completions = map(len, queries.completions) if queries.completions else [n_new + 1] * len(queries)
        found += zip([length + n_new for length in lengths] if n_new else lengths, completions, strict=True)
    return sorted(found), bool(n_new) or any(encoded.sets[name].completions for name in encoded.trained)


def _tokens_measured(spec: TrialSpec, method: Method, n_virtual_tokens: int) -> float:
    wanted = spec.forgetting
    if wanted is None or not method.trains or method.has_own_head:
        return 0.0
    if wanted.harness:
        return math.nan
    n_tokens = 0.0
    for name, data in wanted.tasks.items():
        asked = zero_shot_spec(spec.model, name, data, wanted.limit)
        setting = prepare_trial(asked)
        (test,) = setting.tests
        encoded = encode_prompts(asked, replace(setting, tests=(replace(test, examples=_sample(test.examples)),)))
        encoded = replace(encoded, n_virtual_tokens=n_virtual_tokens)
        lengths = (Lengths(len(test.examples), tuple(sorted(encoded.sets[test.name].lengths))),)
        n_tokens += Reading(len(encoded.prefix), lengths, encoded.shares_prefix, encoded.n_virtual_tokens, encoded.n_new_tokens).n_tokens
    return n_tokens + (_tokens_of_text(spec.model, wanted.text) if wanted.text else 0)


@lru_cache(maxsize=8)
def _tokens_of_text(ref: ModelRef, text: FileRef) -> int:
    (ids,) = encode(load_tokenizer(ref), [read_text(Path(text.path))])
    return len(ids)


def _alone(spec: TrialSpec, setting: PreparedTrial, encoded: EncodedTrial, taught: bool) -> list[EncodedTrial]:
    """What an untouched teacher reads besides its lessons: dev without them."""
    if not taught or DEV not in encoded.sets:
        return []
    return [encode_dev_alone(spec, setting) if setting.decoding else replace(encoded, sets={DEV: encoded.sets[DEV]})]


def _reading(encoded: EncodedTrial, n_dev: int) -> Reading:
    lengths = {name: tuple(sorted(map(len, queries.suffixes))) for name, queries in encoded.sets.items()}
    sets = tuple(Lengths(n_dev if name == DEV else len(sample), sample) for name, sample in lengths.items())
    return Reading(len(encoded.prefix), sets, encoded.shares_prefix, encoded.n_virtual_tokens, encoded.n_new_tokens)


def _largest(cell: Cell) -> Params:
    """The largest value that the search may give to each hyper-parameter that is a number; a method's switches are on."""
    largest: Params = {}
    for name, span in cell.ranges.items():
        ends = span.choices or (int(span.high) if span.integer else span.high,)
        numbers = [end for end in ends if isinstance(end, int | float) and (name in cell.base.settings or not isinstance(end, bool))]
        if len(numbers) == len(ends):
            largest[name] = max(ends)
    return largest


def _n_characters(example: Example) -> int:
    return sum(map(len, (*example.fields.values(), *example.references[:1])))


def _sample(examples: Sequence[Example]) -> tuple[Example, ...]:
    ordered = sorted(examples, key=_n_characters)
    n = min(SAMPLE, len(ordered))
    return tuple(ordered[-(-len(ordered) * (place + 1) // n) - 1] for place in range(n))
