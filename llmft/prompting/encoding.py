"""From text to token ids: whole prompts, and the demonstrations that fit.

A prompt's tokens are those of the whole text. What all prompts of a trial have in common (the demonstrations) is found on the ids, so
that encoding it once is exact for every tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llmft.config import Pattern, render_prefix
from llmft.data import Example
from llmft.errors import Cause, TrialFailure
from llmft.prompting.label_words import LabelWords, encode_completions, encode_decoder_completions
from llmft.prompting.tokenization import PrefixTokenizer, encode

SHOTS, DEV = "shots", "dev"  # names of these sets among a trial's encoded sets
CONTENT_FREE, INPUTS = "content_free", "inputs"  # queries without content; what a lesson asks about

CHUNK = 512  # prompts tokenised at once
SHORTEST_PREFIX = 8  # tokens; below that a cache costs more than it saves
CANDIDATES = 8  # longest queries that are tried when demonstrations must be dropped


@dataclass(frozen=True)
class EncodedQueries:
    """The prompts of one set: what follows the trial's common prefix (in a `bare` set: all of it), and the right answers.
    Lists of the same length.

    `labels` are for classification, with the label `words`. Where text is generated there are `references` instead. Of what is trained
    on, `completions` are the first reference's tokens, or those of a rationale and its label word, and the end of the text; they take
    the place of the `words`. Where an encoder reads the prompts, `start` is what the decoder reads before an answer; it is empty for
    causal models. `texts` are the queries alone, where rationales shall follow them.
    """

    suffixes: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    bare: bool = False
    references: tuple[tuple[str, ...], ...] = ()
    completions: tuple[tuple[int, ...], ...] = ()
    words: LabelWords | None = None
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
    """Every prompt of a trial: `prefix` opens all but those of bare sets; `sets` holds the rest by set name.

    `demonstrations` are the examples in the prompt, `n_dropped` how many more would not fit; `n_virtual_tokens` are the places
    that a method takes in front of every prompt. `n_new_tokens` may follow a prompt where text is generated. `trained` are the sets
    that are trained on; they may be of several tasks, each with its own label words.
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

    def opening(self, name: str) -> tuple[int, ...]:
        """What precedes the suffixes of the set `name`."""
        return () if self.sets[name].bare else self.prefix

    def lengths(self, name: str) -> list[int]:
        """Places that each prompt of the set `name` takes, virtual tokens and what is fed of a completion included."""
        before = self.n_virtual_tokens + len(self.opening(name))
        return [before + n for n in self.sets[name].lengths]


def encode_trial(
    tokenizer,
    pattern: Pattern,
    words: LabelWords | None,
    separator: str,
    demonstrations: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    max_length: int,
    order=None,
    instruction: str = "",
    start: tuple[int, ...] = (),
    share_prefix: bool = True,
    bare: Collection[str] = (),
    n_virtual_tokens: int = 0,
    n_new_tokens: int = 0,
    trained: Collection[str] = (),
    marker: str = "",
) -> EncodedTrial:
    """Tokenise every prompt of a trial.

    Where the longest prompt does not fit, whole demonstrations are dropped, the last drawn first and as many of each label, until
    it does. Neither a query nor the place of the answer is ever cut.

    Args:
        demonstrations: in the order of the draw (labels interleaved).
        words: None where text is generated; then examples have references instead of labels.
        max_length: tokens that a prompt and its label word, or what is generated, may take together; with an encoder, each alone.
        order: a generator that shuffles the demonstrations in the prompt (None: as drawn).
        instruction: text that opens every prompt.
        start: as of `EncodedQueries`; prompts for an encoder keep the tokenizer's closing token.
        share_prefix: whether what all prompts begin with shall be taken apart (`llmft.models.architectures.shares_prefix`).
        bare: names of sets whose prompts get no demonstrations.
        n_virtual_tokens: places of `max_length` that the method takes.
        n_new_tokens: room for what is generated.
        marker: text between the rationale of a demonstration and its label word; empty: rationales are not shown.
        trained: sets that are trained on, as far as they are there; where text is generated, they need their completions, and get
            none while an example has no reference yet, since a teacher gives it.

    Raises:
        TrialFailure: a query does not fit even without demonstrations, or an example that is trained on with its reference
            (QUERY_TOO_LONG).
        UserError: the tokenizer joins a reference with the prompt, or has no token for the end of a text.
    """

    def answer(example: Example) -> str:
        if words is None:
            return example.references[0]
        reason = f"{example.rationale}{marker}{pattern.label_prefix}" if marker else ""
        return reason + words.words[example.label]

    def opening(shown: Sequence[Example]) -> str:
        return render_prefix(pattern, [(example.fields, answer(example)) for example in shown], separator, instruction)

    closed, n_answer = bool(start), n_new_tokens + (words.longest if words else 0)
    limit = max_length - n_virtual_tokens - (0 if start else n_answer - 1)  # the last token of an answer is never fed to the model
    texts = {name: [pattern.render(example.fields) for example in examples] for name, examples in sets.items()}
    shared = {name: queries for name, queries in texts.items() if name not in bare}
    longest = sorted((query for queries in shared.values() for query in queries), key=len)[-CANDIDATES:]
    n_labels = len(words.words) if words else 1

    def fit(n_shown: int, queries: Sequence[str]) -> bool:
        begun = opening(demonstrations[:n_shown])
        return not n_shown or max(len(ids) for ids in encode(tokenizer, [begun + query for query in queries], closed)) <= limit

    kept = list(demonstrations)
    if not fit(len(kept), longest):
        sizes = [*range(len(kept) - n_labels, 0, -n_labels), 0]
        # by halving, for there may be hundreds too many, and by one query, which nearly always tells
        kept = kept[: sizes[bisect_left(sizes, True, key=lambda n: fit(n, longest[-1:]))]]
        while not fit(len(kept), longest):
            kept = kept[:-n_labels]
    while True:
        shown = [kept[i] for i in order.permutation(len(kept))] if order is not None and kept else kept
        prefix, rows = _encode_all(tokenizer, opening(shown), shared, closed, share_prefix)
        if not kept or len(prefix) + max(len(ids) for encoded in rows.values() for ids in encoded) <= limit:
            break
        kept = kept[:-n_labels]
    for name in bare:
        alone = opening(())
        rows[name] = list(map(tuple, encode(tokenizer, [alone + query for query in texts[name]], closed)))
    whole = [(len(ids) + len(() if name in bare else prefix), name, place) for name in sets for place, ids in enumerate(rows[name])]
    length, name, place = max(whole, key=lambda query: query[0])
    if length > limit:
        virtual = f" and {n_virtual_tokens} virtual tokens" * bool(n_virtual_tokens)
        raise TrialFailure(
            Cause.QUERY_TOO_LONG,
            f"the query {sets[name][place].id} takes {length} tokens; with "
            f"{'its label word' if words else f'{n_new_tokens} new tokens'}{virtual} at most {max_length} fit this model or max_length.",
        )
    encoded = {}
    for name, examples in sets.items():
        completions = ()
        if name in trained and (marker or (not words and all(example.references for example in examples))):
            answers = [(example.id, answer(example)) for example in examples]
            if start:
                completions = encode_decoder_completions(tokenizer, answers, max_length - len(start))
            else:
                before, begun = ((), opening(())) if name in bare else (prefix, opening(shown))
                prompts, ids = [begun + query for query in texts[name]], [(*before, *suffix) for suffix in rows[name]]
                completions = encode_completions(tokenizer, pattern, prompts, ids, answers, max_length - n_virtual_tokens)
        if words:
            labels = tuple(example.label for example in examples)
            alone = tuple(pattern.render(example.fields) for example in examples) if marker else ()
            encoded[name] = EncodedQueries(
                tuple(rows[name]), labels, start, name in bare, (), completions, None if completions else words, alone
            )
            continue
        references = tuple(example.references for example in examples)
        encoded[name] = EncodedQueries(tuple(rows[name]), start=start, bare=name in bare, references=references, completions=completions)
    n_dropped, trained = len(demonstrations) - len(kept), tuple(name for name in trained if name in sets)
    return EncodedTrial(prefix, encoded, tuple(shown), n_dropped, n_virtual_tokens, n_new_tokens, trained)


def _encode_all(
    tokenizer, opening: str, queries: Mapping[str, Sequence[str]], closed: bool, share_prefix: bool
) -> tuple[tuple[int, ...], dict[str, list[tuple[int, ...]]]]:
    """The longest common prefix of all prompts, which are the `opening` and a query, that leaves each at least one token, and the rest
    of each prompt, by set.

    Without `share_prefix` it is empty.
    """
    begun: PrefixTokenizer | None = None
    first: list[int] = []  # the rest of the first prompt; every rest begins with first[:common]
    common = 0
    chunks: list[tuple[str, int, list[list[int]]]] = []
    for name, texts in queries.items():
        for start in range(0, len(texts), CHUNK):
            begun = begun or PrefixTokenizer(tokenizer, opening, texts[0], closed)
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
