"""The tokens of prompts that begin alike, against those of each whole prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_models import byte_level_tokenizer, metaspace_tokenizer, t5_tokenizer, toy_text
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AddedToken

from llmft.prompting.tokenization import PrefixTokenizer, cuts_from_left_to_right, encode

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SENTENCE = "Today doctors saw lawyers, and 1234 of them answered: they'll come to the house again.\n\n"


def changed(cut=None, normalizer=None, added=(), dropout=None):
    """A byte-level tokenizer that cuts or normalises texts another way, or knows more tokens."""
    tokenizer = byte_level_tokenizer([*toy_text(), *([SENTENCE] * 200), *(["\n\n   \n    ??  ..."] * 200)], 900)
    core = tokenizer.backend_tokenizer
    if cut is not None:
        core.pre_tokenizer = cut
    if normalizer is not None:
        core.normalizer = normalizer
    core.model.dropout = dropout
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in added])
    return tokenizer


def split(regex: str):
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_alone])


LOCAL = {
    "GPT-2, OPT": changed(),
    "Llama 3": changed(split(LLAMA_3)),
    "Qwen": changed(split(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
    "GPT-NeoX": changed(normalizer=normalizers.NFC(), added=[" " * n for n in range(2, 25)]),
    "StarCoder": changed(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "BART": byte_level_tokenizer(toy_text(), template="<s> $A </s>"),
    "a space in front": changed(pre_tokenizers.ByteLevel(add_prefix_space=True)),
}
GLOBAL = {
    "Llama 2": metaspace_tokenizer(toy_text()),
    "T5": t5_tokenizer(toy_text()),
    "looks behind": changed(split(r"(?<=a)b|\s+(?!\S)|\w+|\s+|.")),
    "looks far ahead": changed(split(r"\w+(?=.*z)|\w|\s+|.")),
    "knows the end": changed(split(r"\w+$|\w|\s+|.")),
    "joins digits over spaces": changed(normalizer=normalizers.Replace(Regex(r"(\d) (\d)"), "$1$2")),
    "merges at random": changed(dropout=0.5),
}
odd = st.text(st.sampled_from("ab d?.\n\t{}\"' éß中🙂1\u0301\u0308</s>") | st.characters(codec="utf-8"), max_size=120)
usual = st.lists(st.sampled_from([SENTENCE, "doctors saw", " ", "\n\n", "   ", "中文", "they'll 12 345", "</s>", "<s>"]), max_size=8).map(
    "".join
)


@pytest.mark.parametrize("kind", [*LOCAL, *GLOBAL])
@pytest.mark.parametrize("closed", [False, True])
@given(opening=st.lists(odd | usual, max_size=6).map("".join), queries=st.lists(odd | usual, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_prompts_have_the_tokens_of_the_whole_text(kind, closed, opening, queries):
    tokenizer = (LOCAL | GLOBAL)[kind]
    if kind == "merges at random":
        return  # no text has tokens of its own there
    whole = encode(tokenizer, [opening + query for query in queries], closed)
    begun = PrefixTokenizer(tokenizer, opening, queries[0], closed)
    assert [begun.ids + rest for rest in begun.rests(queries)] == whole


@pytest.mark.parametrize("kind", LOCAL)
def test_demonstrations_are_tokenised_once_by_tokenizers_that_cut_from_left_to_right(kind):
    tokenizer, opening = LOCAL[kind], SENTENCE * 8
    assert cuts_from_left_to_right(tokenizer)
    begun = PrefixTokenizer(tokenizer, opening, "doctors saw")
    (rest,) = begun.rests(["doctors saw"])
    assert len(begun.ids) > 6 * len(rest)


@pytest.mark.parametrize("kind", GLOBAL)
def test_other_tokenizers_read_every_prompt_whole(kind):
    tokenizer = GLOBAL[kind]
    assert not cuts_from_left_to_right(tokenizer)
    assert PrefixTokenizer(tokenizer, SENTENCE * 8, "doctors saw").ids == []


def test_an_opening_that_is_one_long_piece_is_read_whole():
    tokenizer = LOCAL["GPT-2, OPT"]
    begun = PrefixTokenizer(tokenizer, "a b" + "c" * 200, "c")
    assert begun.ids == [] and begun.rests(["cc"]) == encode(tokenizer, ["a b" + "c" * 202])
