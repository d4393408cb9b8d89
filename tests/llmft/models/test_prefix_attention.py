from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.small_models import config, network

from llmft.methods._registry import build_method
from llmft.models import prefix_attention as shared_prefix
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import encode_prefix, make_batch, scoring_budget
from llmft.models.loading import LoadedModel
from llmft.models.prefix_attention import NAME, attend, attention, encode_shared, matrix_attention, shared_attention
from llmft.models.scoring import label_word_scores
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.label_words import LabelWords

N_WORDS, PREFIX = 400, tuple(range(10, 50))
QUERIES = EncodedQueries(tuple(tuple(range(60 + n, 60 + 2 * n)) for n in (3, 1, 7, 90, 7, 12, 30)), (0, 1, 0, 1, 0, 1, 1))
ONE, SEVERAL = LabelWords(("a", "b"), ((300,), (301,))), LabelWords(("a", "b c"), ((300,), (301, 302)))
SHARE = [
    ("opt", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("llama", {}),
    ("qwen2", {}),
    ("phi", {}),
    ("granite", {}),
]
DO_NOT = [
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {}),
    ("bloom", {}),
    ("falcon", {"alibi": True}),
    ("falcon", {}),
    ("gptj", {}),
    ("gpt_neo", {}),
]


def borrow(architecture: str, changed: dict, precision: str = "fp32") -> LoadedModel:
    return LoadedModel(network(config(architecture, N_WORDS, **changed)), torch.device("cpu"), precision, plain_head=False)


@torch.no_grad()
def scores(model, words, groups, prefix):
    found = torch.zeros(len(QUERIES), 2)
    for group in groups:
        opening = () if prefix else PREFIX
        found[group] = label_word_scores(model, make_batch(QUERIES, group, words, model, prefix, opening)).labels
    return found


@pytest.mark.parametrize("words", [ONE, SEVERAL])
@pytest.mark.parametrize(("architecture", "changed"), SHARE)
def test_every_query_scores_as_its_whole_prompt_alone(architecture, changed, words):
    model = borrow(architecture, changed)
    prefix = encode_shared(model, PREFIX)
    assert prefix.is_shared
    alone = scores(model, words, [[i] for i in range(len(QUERIES))], None)  # one of them is longer than the prefix
    shared = scores(model, words, [[3, 6, 5], [2, 4, 0], [1]], prefix)  # and the last batch is left over
    assert (shared - alone).abs().max() < 1e-4
    assert torch.equal(shared.argmax(1), alone.argmax(1))
    assert alone.std(0).min() > 0.05


@pytest.mark.parametrize(("architecture", "changed"), DO_NOT)
def test_other_attention_is_told_and_keeps_copies(architecture, changed):
    model = borrow(architecture, changed)
    prefix = encode_shared(model, PREFIX)
    assert not prefix.is_shared
    alone = scores(model, ONE, [[i] for i in range(len(QUERIES))], None)
    assert (scores(model, ONE, [[3, 6, 5], [2, 4, 0], [1]], prefix) - alone).abs().max() < 1e-4


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_half_precision_differs_by_its_rounding(weights):
    model = borrow("llama", {}, "bf16")
    model.network.to(weights)
    adapted = AdaptedModel(build_method("in_context", {}), model)
    with torch.no_grad():
        prefix = adapted(encode_shared, PREFIX)
        assert prefix.is_shared
        batch = make_batch(QUERIES, range(len(QUERIES)), ONE, model, prefix)
        shared = adapted(adapted.method.scores, batch).labels
        copied = adapted(adapted.method.scores, replace(batch, prefix=replace(prefix, is_shared=False))).labels
        model.network.float()
        exact = scores(replace(model, precision="fp32"), ONE, [range(len(QUERIES))], None)
    assert (shared - exact).abs().mean() < 1.5 * (copied - exact).abs().mean()


def test_a_wrong_result_is_noticed(monkeypatch):
    model = borrow("opt", {})
    right = shared_prefix.attention

    def wrong(query, key, value, *, causal, scale):
        output, total = right(query, key, value, causal=causal, scale=scale)
        return output, total + 0.05 * (not causal)

    monkeypatch.setattr(shared_prefix, "attention", wrong)
    assert not encode_shared(model, PREFIX).is_shared


def test_the_network_is_as_before_whatever_happens():
    model = borrow("gpt2", {})
    prefix, usual = encode_shared(model, PREFIX), model.network.config._attn_implementation
    assert prefix.is_shared and usual != NAME
    with pytest.raises(ZeroDivisionError), shared_attention(model.network, prefix):
        assert model.network.config._attn_implementation == NAME
        _ = 1 / 0
    assert model.network.config._attn_implementation == usual
    with pytest.raises(LookupError):
        attend(None, *torch.zeros(3, 1, 1, 1, 8), None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_and_its_sum_are_the_softmax(causal, scale):
    torch.manual_seed(0)
    n = 300 if causal else 700  # more than a chunk
    query, key, value = torch.randn(2, 3, n, 16), torch.randn(2, 3, 300, 16), torch.randn(2, 3, 300, 16)
    scores = query @ key.mT * (scale or 16**-0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    for found in (attention, matrix_attention):
        output, total = found(query, key, value, causal=causal, scale=scale)
        torch.testing.assert_close(output, scores.softmax(-1) @ value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(total, scores.logsumexp(-1), atol=1e-5, rtol=1e-4)


def test_rows_hold_nothing_of_the_prefix():
    """Tensors that are born in a pass over many short rows: none is as large as the prefix would be for each of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = borrow("opt", {"n_positions": 2000})
    ids, largest = tuple(i % 300 + 5 for i in range(1500)), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            if isinstance(found, torch.Tensor):
                largest.append(found.untyped_storage().nbytes())
            return found

    def peak(prefix) -> int:
        batch = make_batch(EncodedQueries(((7, 8, 9),) * 40, (0,) * 40), range(40), ONE, model, prefix)
        largest.clear()
        with torch.no_grad(), Sizes():
            label_word_scores(model, batch)
        return max(largest)

    shared = encode_shared(model, ids)
    for_each_row = 40 * shared.layers[0][0].nbytes
    assert shared.is_shared and peak(replace(shared, is_shared=False)) >= for_each_row > 5 * peak(shared)


def test_passes_over_queries_are_no_larger_than_the_prefix():
    model = borrow("opt", {})
    shared = encode_shared(model, PREFIX)
    assert scoring_budget(16384, None) == (2048, 0)
    assert scoring_budget(512, None) == (512, 0)
    assert scoring_budget(16384, encode_prefix(model, PREFIX)) == (16384, 40)
    assert scoring_budget(16384, shared) == (2048, 0)
    assert scoring_budget(512, shared) == (512, 0)
    assert scoring_budget(16384, replace(shared, length=3000)) == (3000, 0)
