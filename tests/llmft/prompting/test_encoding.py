from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_models import byte_level_tokenizer, metaspace_tokenizer, toy_text

from llmft.config.patterns import Pattern, render_prompt
from llmft.data.task import Example
from llmft.errors import Cause, TrialFailure, UserError
from llmft.prompting import encoding as tokens
from llmft.prompting.encoding import PromptEncoder
from llmft.prompting.label_words import LabelWords, resolve_label_words
from llmft.prompting.tokenization import encode
from llmft.tasks._nli import NLI_PATTERNS

TOKENIZERS = {"byte-level": byte_level_tokenizer(toy_text()), "metaspace": metaspace_tokenizer(toy_text())}
FIELDS = {"premise": "Today doctors saw lawyers.", "hypothesis": "doctors saw lawyers"}
YES_NO = ("Yes", "No")
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def example(number: int, premise: str = "doctors saw lawyers.", hypothesis: str = "doctors saw") -> Example:
    return Example(f"row/{number}", {"premise": premise, "hypothesis": hypothesis}, number % 2)


def words_of(tokenizer, pattern: str = "minimal") -> LabelWords:
    return resolve_label_words(tokenizer, NLI_PATTERNS[pattern], YES_NO, FIELDS)


def encoder_of(tokenizer, separator: str, max_length: int) -> PromptEncoder:
    return PromptEncoder(tokenizer, NLI_PATTERNS["minimal"], words_of(tokenizer), separator, max_length)


def direct(tokenizer, encoded, examples, pattern: str = "minimal", separator: str = "\n\n") -> list[list[int]]:
    shown = [(demonstration.fields, YES_NO[demonstration.label]) for demonstration in encoded.demonstrations]
    return [tokenizer(render_prompt(NLI_PATTERNS[pattern], shown, query.fields, separator))["input_ids"] for query in examples]


texts = st.text(st.sampled_from("ab d?.\n\t{}\"' éß中🙂") | st.characters(codec="utf-8"), max_size=25)


@each_tokenizer
@given(
    shown=st.lists(st.tuples(texts, texts), max_size=4),
    queries=st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    pattern=st.sampled_from(list(NLI_PATTERNS)),
    separator=st.sampled_from(["\n\n", "\n", " ", "###"]),
)
@settings(max_examples=60, deadline=None)
def test_prefix_and_rest_are_the_tokens_of_the_whole_prompt(kind, shown, queries, pattern, separator):
    tokenizer = TOKENIZERS[kind]
    demonstrations = [example(i, *pair) for i, pair in enumerate(shown)]
    sets = {
        "dev": [example(i, *pair) for i, pair in enumerate(queries[:2])],
        "test": [example(i, *pair) for i, pair in enumerate(queries)],
    }
    encoder = PromptEncoder(tokenizer, NLI_PATTERNS[pattern], words_of(tokenizer, pattern), separator, 10_000)
    encoded = encoder.encode(demonstrations, sets, np.random.default_rng(0))
    assert sorted(d.id for d in encoded.demonstrations) == sorted(d.id for d in demonstrations) and encoded.n_dropped == 0
    for name, examples in sets.items():
        assert encoded.sets[name].labels == tuple(query.label for query in examples)
        whole = [[*encoded.prefix, *rest] for rest in encoded.sets[name].suffixes]
        assert whole == direct(tokenizer, encoded, examples, pattern, separator)
        assert all(encoded.sets[name].suffixes), "the answer's place must not be in the prefix"


def test_a_prompt_that_another_one_begins_with_keeps_its_last_token():
    queries = [example(0, "b c ?", "c"), example(1, "b", "c")]
    encoded = encoder_of(TOKENIZERS["byte-level"], "\n", 99).encode([], {"t": queries})
    long, short = direct(TOKENIZERS["byte-level"], encoded, queries)
    assert long[: len(short)] == short
    assert [*encoded.prefix, *encoded.sets["t"].suffixes[1]] == short and len(encoded.sets["t"].suffixes[1]) == 1


def test_more_prompts_than_are_tokenised_at_once_keep_their_order():
    queries = [example(i, f"{'Soon' if i > 700 else 'Today'} doctors saw {i}.") for i in range(1100)]
    encoded = encoder_of(TOKENIZERS["byte-level"], "\n", 99).encode([], {"t": queries})
    assert [[*encoded.prefix, *rest] for rest in encoded.sets["t"].suffixes] == direct(TOKENIZERS["byte-level"], encoded, queries)


@each_tokenizer
def test_the_prefix_covers_the_demonstrations(kind):
    tokenizer, shown = TOKENIZERS[kind], [example(i) for i in range(4)]
    encoded = encoder_of(tokenizer, "\n\n", 512).encode(shown, {"t": [example(0, "Soon a."), example(1, "Today b.")]})
    text = "\n\n".join(NLI_PATTERNS["minimal"].render_labelled(d.fields, YES_NO[d.label]) for d in shown)
    assert len(encoded.prefix) >= len(tokenizer(text)["input_ids"])


def test_the_order_of_the_demonstrations_comes_from_its_seed():
    tokenizer, shown = TOKENIZERS["byte-level"], [example(i) for i in range(16)]

    def order(seed):
        generator = None if seed is None else np.random.default_rng(seed)
        return [d.id for d in encoder_of(tokenizer, "\n", 512).encode(shown, {"t": [example(0)]}, generator).demonstrations]

    assert order(None) == [d.id for d in shown]
    assert order(1) == order(1) != order(2)


@given(limit=st.integers(20, 200), n_pairs=st.integers(0, 8), lengths=st.lists(st.integers(1, 15), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_does_not_fit_is_dropped_evenly_and_counted(limit, n_pairs, lengths):
    tokenizer = TOKENIZERS["byte-level"]
    shown = [example(i, "doctors saw lawyers " * (1 + i % 3)) for i in range(2 * n_pairs)]
    queries = [example(i, " saw" * n) for i, n in enumerate(lengths)]
    encoded = encoder_of(tokenizer, "\n\n", limit).encode(shown, {"t": queries}, np.random.default_rng(0))
    whole = [[*encoded.prefix, *rest] for rest in encoded.sets["t"].suffixes]
    assert max(map(len, whole)) <= limit
    assert whole == direct(tokenizer, encoded, queries), "a query was cut"
    kept = sorted(encoded.demonstrations, key=lambda d: int(d.id.split("/")[1]))
    assert kept == shown[: len(kept)] and len(kept) % 2 == 0
    assert encoded.n_dropped == len(shown) - len(kept)
    if len(kept) < len(shown):  # one more of each label would have been too long
        more = [(d.fields, YES_NO[d.label]) for d in shown[: len(kept) + 2]]
        assert max(len(tokenizer(render_prompt(NLI_PATTERNS["minimal"], more, q.fields, "\n\n"))["input_ids"]) for q in queries) > limit


def test_hundreds_too_many_are_dropped_in_a_few_looks(monkeypatch):
    """Reading 256 demonstrations again for each pair that is dropped takes a minute, and distillation does so for every lesson."""
    tokenizer, looks = TOKENIZERS["byte-level"], []
    monkeypatch.setattr(tokens, "encode", lambda *given: looks.append(given) or encode(*given))
    encoder, shown = encoder_of(tokenizer, "\n", 200), [example(i) for i in range(256)]
    assert 0 < encoder.encode(shown, {"t": [example(0)]}).n_dropped < 256
    assert len(looks) < 12


def test_a_query_that_does_not_fit_alone_is_named():
    tokenizer, queries = TOKENIZERS["byte-level"], [example(0), example(7, "saw " * 50)]
    with pytest.raises(TrialFailure, match="row/7") as raised:
        encoder_of(tokenizer, "\n", 30).encode([], {"t": queries})
    assert raised.value.cause is Cause.QUERY_TOO_LONG


def test_the_limit_is_exact_and_leaves_room_for_the_label_word():
    tokenizer, query = TOKENIZERS["byte-level"], example(0)
    length = len(tokenizer(NLI_PATTERNS["minimal"].render(query.fields))["input_ids"])
    for word_length in (1, 3):  # all but the word's last token are fed to the model
        words = LabelWords(YES_NO, ((5,) * word_length, (6,)))
        encoder = PromptEncoder(tokenizer, NLI_PATTERNS["minimal"], words, "\n", length + word_length - 1)
        encoder.encode([], {"t": [query]})
        with pytest.raises(TrialFailure):
            replace(encoder, max_length=encoder.max_length - 1).encode([], {"t": [query]})


@each_tokenizer
@pytest.mark.parametrize("pattern", NLI_PATTERNS)
def test_label_words_are_what_follows_the_prompt(kind, pattern):
    tokenizer = TOKENIZERS[kind]
    words = words_of(tokenizer, pattern)
    assert [tokenizer.decode(list(ids)).strip() for ids in words.ids] == list(YES_NO)
    prompt = NLI_PATTERNS[pattern].render(FIELDS)
    for word, ids in zip(YES_NO, words.ids, strict=True):
        assert tokenizer(prompt + " " + word)["input_ids"] == tokenizer(prompt)["input_ids"] + list(ids)


def test_the_space_belongs_to_the_label_word():
    tokenizer = TOKENIZERS["byte-level"]
    spaced = words_of(tokenizer)
    bare = resolve_label_words(tokenizer, Pattern(template="{premise} =>", label_prefix=""), YES_NO, FIELDS)
    assert spaced.single and not set(spaced.ids) & set(bare.ids)


@each_tokenizer
def test_label_words_of_several_tokens(kind):
    tokenizer = TOKENIZERS[kind]
    words = resolve_label_words(tokenizer, NLI_PATTERNS["minimal"], ("Yes", "No Yes or"), FIELDS)
    assert not words.single and words.longest == len(words.ids[1]) > 1
    assert tokenizer.decode(list(words.ids[1])).strip() == "No Yes or"


@each_tokenizer
def test_a_pattern_that_ends_in_a_space_is_refused(kind):
    with pytest.raises(UserError, match="does not end in a space") as raised:
        resolve_label_words(TOKENIZERS[kind], Pattern(template="{premise} answer: ", label_prefix=""), YES_NO, FIELDS)
    assert "'Yes'" in str(raised.value)


def test_a_word_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(UserError, match="'是' is unknown"):
        resolve_label_words(TOKENIZERS["metaspace"], NLI_PATTERNS["minimal"], ("Yes", "是"), FIELDS)


def test_an_empty_word_is_refused():
    with pytest.raises(UserError, match="unknown"):
        resolve_label_words(TOKENIZERS["byte-level"], Pattern(template="{premise} ?", label_prefix=""), ("Yes", ""), FIELDS)


@pytest.mark.parametrize("words", [("Yes", "Yes"), ("是", "否")])
def test_two_words_with_the_same_tokens_are_refused(words):
    tokenizer = TOKENIZERS["metaspace"]
    if words[0] != words[1]:  # a tokenizer whose unknown token also opens the text, as GPT-2's: only the collision shows
        tokenizer = metaspace_tokenizer(toy_text())
        tokenizer.bos_token = tokenizer.unk_token
    with pytest.raises(UserError, match="same tokens"):
        resolve_label_words(tokenizer, NLI_PATTERNS["minimal"], words, FIELDS)


def test_a_closing_token_is_not_left_between_prompt_and_label_word():
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(toy_text())
    plain = tokenizer("doctors saw ?")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    words = words_of(tokenizer)
    encoded = PromptEncoder(tokenizer, Pattern(template="{premise} ?"), words, "\n", 99).encode([], {"t": [example(0, "doctors saw")]})
    assert [*encoded.prefix, *encoded.sets["t"].suffixes[0]] == [0, *plain[1:]]
    assert words.ids == words_of(TOKENIZERS["byte-level"]).ids
