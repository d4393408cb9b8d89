from __future__ import annotations

import dataclasses

import pytest
import torch
from support.small_models import OPT_350M, config, network

from llmft.data.task import NO_LABEL
from llmft.models.batch_planning import batch_by_tokens
from llmft.models.batches import encode_prefix, make_batch
from llmft.models.loading import LoadedModel, _has_plain_head
from llmft.models.scoring import answer_logits, label_word_scores, word_log_probabilities
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.label_words import LabelWords

N_WORDS = 90
PREFIX = tuple(range(40, 70))
QUERIES = tuple(tuple((7 * i + 3 * j) % N_WORDS for j in range(length)) for i, length in enumerate((3, 11, 1, 8, 20)))
SINGLE = LabelWords(("a", "b", "c"), ((7,), (8,), (33,)))
SEVERAL = LabelWords(("a", "b", "c"), ((7, 9, 12), (8,), (7, 5)))
ARCHITECTURES = {
    "opt": {}, "opt 350m": OPT_350M, "gpt2": {}, "gpt_neo": {}, "gptj": {}, "gpt_neox": {}, "llama": {}, "qwen2": {}, "phi": {},
    "bloom": {}, "falcon": {}, "falcon alibi": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mistral": {"sliding_window": 8},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 8}, "granite": {"logits_scaling": 4.0},
}  # fmt: skip
CHANGED_HEAD = ("gemma2", "granite")


def borrowed(architecture: str) -> LoadedModel:
    made = network(config(architecture.split()[0], N_WORDS, **ARCHITECTURES[architecture]))
    return LoadedModel(made, torch.device("cpu"), "fp32", _has_plain_head(made))


@torch.no_grad()
def brute_force(model: LoadedModel, words: LabelWords) -> torch.Tensor:
    """[queries, labels]: one label of one query at a time, through the network's own logits."""
    scores = []
    for query in QUERIES:
        row = []
        for ids in words.ids:
            log_probabilities = model.network(torch.tensor([[*PREFIX, *query, *ids]])).logits[0].double().log_softmax(-1)
            first = len(PREFIX) + len(query) - 1
            row.append(sum(float(log_probabilities[first + step, token]) for step, token in enumerate(ids)))
        scores.append(row)
    return torch.tensor(scores)


@torch.no_grad()
def ours(model: LoadedModel, words: LabelWords, shared: bool, indices=range(len(QUERIES))) -> torch.Tensor:
    queries = EncodedQueries(QUERIES, (0,) * len(QUERIES))
    prefix = encode_prefix(model, PREFIX) if shared else None
    return label_word_scores(model, make_batch(queries, list(indices), words, model, prefix, () if shared else PREFIX)).labels


@torch.no_grad()
@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", ["opt", "gemma2"])
def test_logits_of_all_words_wherever_an_answer_may_go_on(architecture, words):
    model, queries = borrowed(architecture), EncodedQueries(QUERIES, (0,) * len(QUERIES))
    batch = make_batch(queries, range(len(QUERIES)), words, model, encode_prefix(model, PREFIX))
    ours = answer_logits(model, batch)
    beginnings = ((),) if words is SINGLE else ((), (7,), (7, 9))
    prompts = [[torch.tensor([[*PREFIX, *query, *ids]]) for ids in beginnings] for query in QUERIES]
    expected = torch.stack([torch.stack([model.network(ids).logits[0, -1] for ids in row]) for row in prompts])
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-5)
    words_of_ours = word_log_probabilities(ours.log_softmax(-1), words)
    torch.testing.assert_close(words_of_ours, label_word_scores(model, batch).labels, atol=5e-5, rtol=0)
    known = answer_logits(model, dataclasses.replace(batch, label_words=dataclasses.replace(words, n_known=80)))
    assert torch.equal(known, ours[..., :80])


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prefix", "whole prompts"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_sums_of_log_probabilities(architecture, shared, words):
    model = borrowed(architecture)
    expected = brute_force(model, words)
    assert expected.std(0).min() > 0.05
    torch.testing.assert_close(ours(model, words, shared), expected.float(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_scaled_or_capped_head_is_noticed(architecture):
    assert borrowed(architecture).plain_head == (architecture not in CHANGED_HEAD)


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prefix", "whole prompts"])
def test_padding_and_neighbours_change_nothing(shared, words):
    model = borrowed("opt")
    alone = torch.cat([ours(model, words, shared, [i]) for i in range(len(QUERIES))])
    torch.testing.assert_close(ours(model, words, shared), alone, atol=1e-5, rtol=0)
    backwards = list(reversed(range(len(QUERIES))))
    torch.testing.assert_close(ours(model, words, shared, backwards), alone[backwards], atol=1e-5, rtol=0)


def test_a_shared_prefix_can_be_used_again():
    model, queries = borrowed("llama"), EncodedQueries(QUERIES, (0,) * len(QUERIES))
    with torch.no_grad():
        prefix = encode_prefix(model, PREFIX)
        first, again = (label_word_scores(model, make_batch(queries, [0, 1], SINGLE, model, prefix)).labels for _ in range(2))
    torch.testing.assert_close(first, again, atol=0, rtol=0)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_best_of_all_words_is_told_from_the_best_label_word(shift):
    model = borrowed("opt")
    with torch.no_grad():
        best = [int(model.network(torch.tensor([[*PREFIX, *query]])).logits[0, -1].argmax()) for query in QUERIES]
    words = LabelWords(("a", "b"), ((best[0] + shift,), (best[1] + shift,)))
    expected = [next((label for label, ids in enumerate(words.ids) if ids == (token,)), NO_LABEL) for token in best]
    batch = make_batch(EncodedQueries(QUERIES, (0,) * len(QUERIES)), range(len(QUERIES)), words, model, None, PREFIX)
    assert label_word_scores(model, batch).full_vocab.tolist() == expected
    assert (NO_LABEL in expected) and (shift or {0, 1} <= set(expected))


def test_a_word_of_several_tokens_is_the_best_only_if_each_is():
    model = borrowed("opt")
    with torch.no_grad():
        ids = [*PREFIX, *QUERIES[0]]
        for _ in range(2):
            ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
        other = (ids[-2] + 1) % N_WORDS  # not the best first token, but followed by the best second one
        after_other = int(model.network(torch.tensor([[*ids[:-2], other]])).logits[0, -1].argmax())
    greedy = tuple(ids[-2:])
    queries = EncodedQueries(QUERIES[:1], (0,))
    for word, expected in ((greedy, 1), ((greedy[0], greedy[1] + 1), NO_LABEL), ((other, after_other), NO_LABEL)):
        words = LabelWords(("a", "b"), ((greedy[0] + 2, 3), word))
        assert label_word_scores(model, make_batch(queries, [0], words, model, None, PREFIX)).full_vocab.tolist() == [expected]


@pytest.mark.parametrize(("budget", "overhead"), [(50, 0), (50, 10), (1, 0), (10_000, 0)])
def test_batches_hold_every_query_once_under_the_budget(budget, overhead):
    lengths = [5, 40, 7, 7, 12, 3, 60, 5]
    groups = batch_by_tokens(lengths, budget, overhead)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = (max(lengths[i] for i in group) + overhead) * len(group)
        assert padded <= budget or len(group) == 1
    assert (len(groups) == 1) == (budget == 10_000)
    assert groups[0][0] == 6  # the longest comes first
