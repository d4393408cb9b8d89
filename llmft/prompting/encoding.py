"""From text to token ids: whole prompts, and the demonstrations that fit.

A prompt's tokens are those of the whole text. What all prompts of a trial have in common (the demonstrations) is found on the ids, so
that encoding it once is exact for every tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmft.config import Pattern, render_prefix
from llmft.data import Example
from llmft.errors import Cause, TrialFailure
from llmft.prompting.label_words import LabelWords, encode_completions, encode_decoder_completions
from llmft.prompting.tokenization import PrefixTokenizer, encode

SHOTS, DEV = "shots", "dev"  # names of these sets among a trial's encoded sets
CONTENT_FREE, INPUTS = "content_free", "inputs"  # queries without content; what a teacher is asked about

CHUNK = 512  # prompts tokenised at once
SHORTEST_PREFIX = 8  # tokens; below that a cache costs more than it saves
CANDIDATES = 8  # longest queries that are tried when demonstrations must be dropped


@dataclass(frozen=True)
class EncodedQueries:
    """The prompts of one set and their right answers; sequences of the same length.

    Attributes:
        suffixes: token ids of each prompt behind the trial's common prefix; all of it in a set `without_demonstrations`.
        labels: for classification; where text is generated there are `references` instead.
        decoder_prefix: token ids that a decoder reads before an answer, where an encoder reads the prompts; empty for causal models.
        completions: of what is trained on, the tokens of the first reference, or of a rationale and its label word, and the end of
            the text; they take the place of the `label_words`.
        texts: the queries alone, where rationales shall follow them.
    """

    suffixes: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] = ()
    decoder_prefix: tuple[int, ...] = ()
    without_demonstrations: bool = False
    references: tuple[tuple[str, ...], ...] = ()
    completions: tuple[tuple[int, ...], ...] = ()
    label_words: LabelWords | None = None
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.suffixes)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each that go through the network behind the common prefix; the last of a completion never does."""
        longer = [len(ids) - 1 for ids in self.completions] or [0] * len(self)
        return [len(ids) + more for ids, more in zip(self.suffixes, longer, strict=True)]


@dataclass(frozen=True)
class EncodedTrial:
    """Every prompt of a trial.

    Attributes:
        prefix: token ids that all prompts begin with, but those of sets without demonstrations.
        sets: the rest of the prompts, by set name.
        demonstrations: the examples in the prompt, in its order; `n_dropped` more would not fit.
        n_virtual_tokens: places that a method takes in front of every prompt.
        n_new_tokens: how many tokens may follow a prompt where text is generated.
        trained: names of the sets that are trained on; they may be of several tasks, each with its own label words.
    """

    prefix: tuple[int, ...]
    sets: Mapping[str, EncodedQueries]
    demonstrations: tuple[Example, ...]
    n_dropped: int
    n_virtual_tokens: int = 0
    n_new_tokens: int = 0
    trained: tuple[str, ...] = ()

    @property
    def shares_prefix(self) -> bool:
        """Whether the prefix is worth encoding once for many queries; virtual tokens stand in front of it."""
        return len(self.prefix) >= SHORTEST_PREFIX and not self.n_virtual_tokens

    def prefix_of(self, name: str) -> tuple[int, ...]:
        """The token ids before the suffixes of the set `name`."""
        return () if self.sets[name].without_demonstrations else self.prefix

    def lengths(self, name: str) -> list[int]:
        """Places that each prompt of the set `name` takes, virtual tokens and what is fed of a completion included."""
        before = self.n_virtual_tokens + len(self.prefix_of(name))
        return [before + n for n in self.sets[name].lengths]


@dataclass(frozen=True)
class PromptEncoder:
    """Makes token ids of a trial's prompts.

    Attributes:
        label_words: None where text is generated; then examples have references instead of labels.
        separator: text between demonstrations.
        max_length: tokens that a prompt and its label word, or what is generated, may take together; with an encoder, each alone.
        instruction: text that every prompt begins with.
        decoder_prefix: token ids that a decoder reads before an answer; prompts for an encoder end in the tokenizer's end token.
        share_prefix: whether what all prompts begin with is taken apart (`llmft.models.ModelInfo.can_share_prefix`).
        n_virtual_tokens: places of `max_length` that the method takes.
        n_new_tokens: room for what is generated.
        marker: text between the rationale of a demonstration and its label word; empty: rationales are not shown.
        trained: names of sets that are trained on. Where text is generated they get completions, but none while an example has no
            reference yet, since a teacher gives it.
    """

    tokenizer: Any
    pattern: Pattern
    label_words: LabelWords | None
    separator: str
    max_length: int
    instruction: str = ""
    decoder_prefix: tuple[int, ...] = ()
    share_prefix: bool = True
    n_virtual_tokens: int = 0
    n_new_tokens: int = 0
    marker: str = ""
    trained: tuple[str, ...] = ()

    def encode(
        self,
        demonstrations: Sequence[Example],
        sets: Mapping[str, Sequence[Example]],
        order: np.random.Generator | None = None,
        without_demonstrations: Collection[str] = (),
    ) -> EncodedTrial:
        """Tokenize every prompt of a trial.

        Where the longest prompt does not fit, whole demonstrations are dropped, the last drawn first and as many of each label, until
        it does. Neither a query nor the place of the answer is ever cut.

        Args:
            demonstrations: in the order of the draw (labels interleaved).
            order: shuffles the demonstrations in the prompt; None: as drawn.
            without_demonstrations: names of sets whose prompts get no demonstrations.

        Raises:
            TrialFailure: a query does not fit even without demonstrations, or an example that is trained on with its reference
                (QUERY_TOO_LONG).
            UserError: the tokenizer joins a reference with the prompt, or has no token for the end of a text.
        """
        texts = {name: [self.pattern.render(example.fields) for example in examples] for name, examples in sets.items()}
        alone = {name for name in sets if name in without_demonstrations}
        shown, prefix, rows = self._encode_demonstrations(
            demonstrations, {name: queries for name, queries in texts.items() if name not in alone}, order
        )
        before = {name: self._text_before(() if name in alone else shown) for name in sets}
        for name in alone:
            prompts = [before[name] + query for query in texts[name]]
            rows[name] = list(map(tuple, encode(self.tokenizer, prompts, self._add_eos)))
        prefixes = {name: () if name in alone else prefix for name in sets}
        self._check_lengths(sets, prefixes, rows)
        encoded = {}
        for name, examples in sets.items():
            completions: tuple[tuple[int, ...], ...] = ()
            if name in self.trained and (self.marker or (not self.label_words and all(example.references for example in examples))):
                prompts = [before[name] + query for query in texts[name]]
                completions = self._completions(examples, prompts, [(*prefixes[name], *row) for row in rows[name]])
            encoded[name] = EncodedQueries(
                tuple(rows[name]),
                labels=tuple(map(_label_of, examples)) if self.label_words else (),
                decoder_prefix=self.decoder_prefix,
                without_demonstrations=name in alone,
                references=() if self.label_words else tuple(example.references for example in examples),
                completions=completions,
                label_words=None if completions else self.label_words,
                texts=tuple(texts[name]) if self.marker else (),
            )
        return EncodedTrial(
            prefix,
            encoded,
            tuple(shown),
            n_dropped=len(demonstrations) - len(shown),
            n_virtual_tokens=self.n_virtual_tokens,
            n_new_tokens=self.n_new_tokens,
            trained=tuple(name for name in self.trained if name in sets),
        )

    @property
    def _add_eos(self) -> bool:
        return bool(self.decoder_prefix)

    @property
    def _limit(self) -> int:
        """The tokens of the longest prompt; the last token of an answer is never fed to a causal model, nor any to an encoder."""
        n_answer = self.n_new_tokens + (self.label_words.longest if self.label_words else 0)
        return self.max_length - self.n_virtual_tokens - (0 if self.decoder_prefix else n_answer - 1)

    def _answer(self, example: Example) -> str:
        """The text that follows a query: its rationale, where there are any, and its label word; or its first reference."""
        if self.label_words is None:
            return example.references[0]
        rationale = f"{example.rationale}{self.marker}{self.pattern.label_prefix}" if self.marker else ""
        return rationale + self.label_words.texts[_label_of(example)]

    def _text_before(self, demonstrations: Sequence[Example]) -> str:
        """The text before a query: the instruction and the demonstrations."""
        answered = [(example.fields, self._answer(example)) for example in demonstrations]
        return render_prefix(self.pattern, answered, self.separator, self.instruction)

    def _encode_demonstrations(
        self, demonstrations: Sequence[Example], queries: Mapping[str, Sequence[str]], order: np.random.Generator | None
    ) -> tuple[list[Example], tuple[int, ...], dict[str, list[tuple[int, ...]]]]:
        """Choose the demonstrations that fit before every one of the `queries`, by set.

        Returns:
            The demonstrations in the order of the prompt, the token ids that all prompts begin with, and the rest of each prompt.
        """
        n_labels = len(self.label_words.texts) if self.label_words else 1
        longest = sorted((query for texts in queries.values() for query in texts), key=len)[-CANDIDATES:]
        kept = list(demonstrations)
        if not self._demonstrations_fit(kept, longest):
            sizes = [*range(len(kept) - n_labels, 0, -n_labels), 0]
            # by halving, for there may be hundreds too many, and by one query, which nearly always tells
            kept = kept[: sizes[bisect_left(sizes, True, key=lambda n: self._demonstrations_fit(kept[:n], longest[-1:]))]]
            while not self._demonstrations_fit(kept, longest):
                kept = kept[:-n_labels]
        while True:
            shown = [kept[i] for i in order.permutation(len(kept))] if order is not None and kept else kept
            prefix, rows = _encode_all(self.tokenizer, self._text_before(shown), queries, self._add_eos, self.share_prefix)
            if not kept or len(prefix) + max(len(ids) for encoded in rows.values() for ids in encoded) <= self._limit:
                return shown, prefix, rows
            kept = kept[:-n_labels]

    def _demonstrations_fit(self, demonstrations: Sequence[Example], queries: Sequence[str]) -> bool:
        if not demonstrations:
            return True
        before = self._text_before(demonstrations)
        return max(map(len, encode(self.tokenizer, [before + query for query in queries], self._add_eos))) <= self._limit

    def _check_lengths(
        self,
        sets: Mapping[str, Sequence[Example]],
        prefixes: Mapping[str, tuple[int, ...]],
        rows: Mapping[str, Sequence[tuple[int, ...]]],
    ) -> None:
        lengths = [(len(prefixes[name]) + len(ids), name, i) for name in sets for i, ids in enumerate(rows[name])]
        length, name, i = max(lengths, key=lambda query: query[0])
        if length > self._limit:
            virtual = f" and {self.n_virtual_tokens} virtual tokens" * bool(self.n_virtual_tokens)
            raise TrialFailure(
                Cause.QUERY_TOO_LONG,
                f"the query {sets[name][i].id} takes {length} tokens; with "
                f"{'its label word' if self.label_words else f'{self.n_new_tokens} new tokens'}{virtual} at most {self.max_length} "
                "fit this model or max_length.",
            )

    def _completions(
        self, examples: Sequence[Example], prompts: Sequence[str], ids: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], ...]:
        """The token ids of each example's answer; `prompts` are the texts before it and `ids` their tokens."""
        answers = [(example.id, self._answer(example)) for example in examples]
        if self.decoder_prefix:
            return encode_decoder_completions(self.tokenizer, answers, self.max_length - len(self.decoder_prefix))
        return encode_completions(self.tokenizer, self.pattern, prompts, ids, answers, self.max_length - self.n_virtual_tokens)


def _label_of(example: Example) -> int:
    assert example.label is not None, "an example of a task with label words has a label"
    return example.label


def _encode_all(
    tokenizer, text: str, queries: Mapping[str, Sequence[str]], add_eos: bool, share_prefix: bool
) -> tuple[tuple[int, ...], dict[str, list[tuple[int, ...]]]]:
    """The longest common prefix of all prompts, which are the `text` and a query, that leaves each at least one token, and the rest
    of each prompt, by set.

    Without `share_prefix` it is empty.
    """
    begun: PrefixTokenizer | None = None
    first: list[int] = []  # the rest of the first prompt; every rest begins with first[:common]
    common = 0
    chunks: list[tuple[str, int, list[list[int]]]] = []
    for name, texts in queries.items():
        for start in range(0, len(texts), CHUNK):
            begun = begun or PrefixTokenizer(tokenizer, text, texts[0], add_eos)
            rests = begun.rests(texts[start : start + CHUNK])
            if not first:
                first, common = rests[0], len(rests[0]) - 1 if share_prefix else 0
            for rest in rests:
                common = _n_common(first, rest, min(common, len(rest) - 1))
            chunks.append((name, common, [rest[common:] for rest in rests]))
    rows: dict[str, list[tuple[int, ...]]] = {name: [] for name in queries}
    before = [] if begun is None or share_prefix else begun.ids
    for name, cut, suffixes in chunks:
        returned = [*before, *first[common:cut]]  # what is not shared, or what later prompts turned out not to share
        rows[name] += [tuple(returned + suffix) for suffix in suffixes]
    return (*begun.ids, *first[:common]) if begun and share_prefix else (), rows


def _n_common(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """How many of the first `limit` ids are the same."""
    if left[:limit] == right[:limit]:
        return limit
    return next(i for i in range(limit) if left[i] != right[i])
