"""What a cell's trials put through the network: how long their prompts are, from the very draws and a sample of the test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmft.batches import SHORTEST_PREFIX
from llmft.setting import DEV, SHOTS, draw, encode_prompts, settle
from llmft.spec import TrialSpec
from llmft.task import Draw, Example
from llmft.tokens import LabelWords
from sweeps.cells import Cell, Params

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
        """(prompts, tokens of each with its `opening`) of the batches under a budget of tokens, one for each quantile."""
        step, longest = self.n / len(self.sample), [opening + length for length in self.sample]
        return [(max(1, min(round(place * step), budget // length)), length) for place, length in enumerate(longest, 1)]


@dataclass(frozen=True)
class Workload:
    """The heaviest of a cell's trials.

    Attributes:
        spec: with the values of its search ranges that need the most, and of its seeds the one with the longest draw.
        words, start: the label words, and what a decoder of its own reads before them.
        prefix: tokens that open every prompt: the demonstrations, and what their pattern begins with.
        shots: tokens of each example that is trained on; empty where nothing is trained.
        dev, tests: what is scored besides.
    """

    spec: TrialSpec
    words: LabelWords
    prefix: int
    shots: tuple[int, ...]
    dev: Lengths | None
    tests: Mapping[str, Lengths]
    start: tuple[int, ...] = ()

    @property
    def shares_prefix(self) -> bool:
        """Whether the prefix is encoded once, and its keys and values kept (`llmft.evaluate.Evaluator`)."""
        return not self.shots and self.prefix >= SHORTEST_PREFIX

    def largest_batches(self, budget: int) -> set[tuple[int, int]]:
        """(prompts, tokens of each, prefix included) of the scored batches that may need the most: the longest, and the most prompts."""
        shapes = [shape for lengths in self.scored for shape in lengths.batches(budget, self.prefix)]
        return {max(shapes), max(shapes, key=lambda shape: shape[::-1]), max(shapes, key=lambda shape: shape[0] * shape[1])}

    @property
    def scored(self) -> list[Lengths]:
        return [*filter(None, [self.dev]), *self.tests.values()]

    @property
    def tokens_trained(self) -> int:
        return self.spec.train.epochs * sum(self.prefix + length for length in self.shots)

    def tokens_evaluated(self, with_tests: bool) -> float:
        """Tokens of everything that is scored: dev at every look, the test sets once for every checkpoint rule."""
        looks = -(-self.spec.train.epochs // self.spec.train.eval_every_epochs) if self.shots else 1
        sets = [(looks, self.dev)] if self.dev else []
        sets += [(len(self.spec.selections), lengths) for lengths in self.tests.values()] if with_tests else []
        opening = 0 if self.shares_prefix else self.prefix
        return sum(times * (lengths.n_tokens + lengths.n * opening) for times, lengths in sets)


def heaviest(cells: Sequence[Cell]) -> Workload:
    """The heaviest trial of cells that differ in their shots alone.

    Raises:
        UserError: what the spec names cannot be had or does not go together.
        TrialFailure: a prompt does not fit the model.
    """
    cell = max(cells, key=lambda cell: cell.base.n_shots)  # fewer shots are a subset of more
    spec = cell.report_spec(_largest(cell), 0)
    setting = settle(spec)
    method = setting.method
    seeds = {*cell.report_seeds, *(cell.search.seeds if cell.search else ())}
    draws = [
        draw(spec.model_copy(update={"data_seed": seed}), setting.task, setting.data, method)
        for seed in sorted(seeds)[:MOST_SEEDS]
    ]

    def weight(drawn: Draw) -> int:
        return sum(map(_n_characters, method.context(drawn.shots))) or max(map(_n_characters, drawn.shots), default=0)

    longest = max(draws, key=weight)
    sampled = replace(
        setting,
        draw=replace(longest, dev=_sample(longest.dev)),
        tests=tuple(replace(test, examples=_sample(test.examples)) for test in setting.tests),
    )
    encoded = encode_prompts(spec, sampled)
    lengths = {name: tuple(sorted(map(len, queries.suffixes))) for name, queries in encoded.sets.items()}
    return Workload(
        spec,
        setting.words,
        len(encoded.prefix),
        lengths.get(SHOTS, ()),
        Lengths(len(longest.dev), lengths[DEV]) if longest.dev else None,
        {test.name: Lengths(len(test.examples), lengths[test.name]) for test in setting.tests},
        setting.start,
    )


def _largest(cell: Cell) -> Params:
    """The largest value that the search may give to each hyper-parameter that is a number."""
    largest: Params = {}
    for name, span in cell.ranges.items():
        ends = span.choices or (int(span.high) if span.integer else span.high,)
        if all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
            largest[name] = max(ends)
    return largest


def _n_characters(example: Example) -> int:
    return sum(map(len, example.fields.values()))


def _sample(examples: Sequence[Example]) -> tuple[Example, ...]:
    ordered = sorted(examples, key=_n_characters)
    n = min(SAMPLE, len(ordered))
    return tuple(ordered[-(-len(ordered) * (place + 1) // n) - 1] for place in range(n))
