from __future__ import annotations

import math

import pytest
import torch

from llmft.evaluation.perplexity import text_likelihood, windows
from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import borrow_model, load_tokenizer
from llmft.tasks._toy_language import toy_data

TEXT = " \n".join(f"{pair.premise} {pair.hypothesis}" for pair in toy_data().train[:40]) + " Ünïcode\tend"
LENGTH = 24


@pytest.fixture(scope="module")
def base(small_opt):
    with borrow_model(small_opt, "fp32", torch.device("cpu")) as model:
        yield AdaptedModel(build_method("zero_shot", {}), model)


@torch.no_grad()
def brute_force(network, tokens: list[int], contexts: list[int]) -> float:
    """Token i + 1 given the `contexts[i]` tokens before it, one forward pass each."""
    total = 0.0
    for place, n in enumerate(contexts, 1):
        logits = network(input_ids=torch.tensor([tokens[place - n : place]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[tokens[place]].item()
    return total


@pytest.mark.parametrize("stride", [None, 7, 1])
def test_every_token_is_scored_once_with_the_context_that_the_stride_says(base, small_opt, stride):
    tokenizer = load_tokenizer(small_opt)
    text = TEXT[:600]
    tokens = [2, *tokenizer(text)["input_ids"]]
    assert tokens[1] == 2 and len(tokens) > 3 * LENGTH
    n, step = len(tokens) - 1, stride or LENGTH
    contexts = []
    for i in range(n):
        end = min((i // step + 1) * step, n)  # the window that scores it sees LENGTH tokens up to its own end
        contexts.append(i + 1 - max(0, end - LENGTH))
    found = text_likelihood(base, tokenizer, text, LENGTH, stride, budget=100)
    assert found.log_likelihood == pytest.approx(brute_force(base.network, tokens, contexts), rel=1e-6)
    assert (found.n_tokens, found.n_bytes) == (n, len(text.encode()))


def test_the_units_are_those_of_their_names(base, small_opt):
    found = text_likelihood(base, load_tokenizer(small_opt), "the cats\n  saw the Ü", 64)
    assert (found.n_words, found.n_bytes) == (5, 21)
    nats = -found.log_likelihood
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 21)
    assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte)
    assert math.log(found.word_perplexity) * found.n_words == pytest.approx(nats)
    assert math.log(found.token_perplexity) * found.n_tokens == pytest.approx(nats)


@pytest.mark.parametrize(("n", "length", "stride"), [(2, 8, 8), (9, 8, 8), (10, 8, 8), (100, 8, 3), (100, 8, 1)])
def test_windows_cover_every_token_once_and_none_is_too_long(n, length, stride):
    scored = []
    for begin, end, count in windows(n, length, stride):
        assert begin >= 0 and end <= n and 1 <= count <= end - begin - 1 <= length
        scored += range(end - count, end)
    assert scored == list(range(1, n))
