"""The Fisher information of a model's next words, against plain autograd, and what elastic weight consolidation does with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from support.small_models import CPU, config, network

from llmft.errors import TrialFailure
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._base import Method
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import LoadedModel, borrow_model
from llmft.prompting.encoding import SHOTS, EncodedQueries, EncodedTrial
from llmft.seeds import stream
from llmft.training import weight_anchor as fisher
from llmft.training.weight_anchor import diagonal_fisher
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

OPENING, QUERIES = (2,), ((3, 5), (9, 4, 8, 3), (7, 7, 1))  # of different lengths, which tell them apart


def evaluator_of(net, precision="fp32", start=()) -> Evaluator:
    model = LoadedModel(net.requires_grad_(True), torch.device("cpu"), precision, plain_head=True)
    queries = EncodedQueries(QUERIES, (0,) * len(QUERIES), start)
    return Evaluator(AdaptedModel(Method(), model), EncodedTrial(OPENING, {SHOTS: queries}, (), 0), None, CPU)


def gradients(loss, parameters) -> torch.Tensor:
    """All in one row; zero where the loss does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])


def in_a_row(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture
def drawn(monkeypatch):
    """The words of each sample, as they were drawn."""
    words, real = [], torch.multinomial

    def multinomial(*args, **kwargs):
        words.append(real(*args, **kwargs))
        return words[-1]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return words


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_each_sample_is_squared_by_itself(family, drawn):
    start = (0,) if family == "t5" else ()
    evaluator = evaluator_of(net := network(config(family, 30)), start=start)
    parameters = list(net.parameters())
    found, n_tokens = diagonal_fisher(evaluator, parameters, 7, seed=3)
    turns, expected = stream(3, "order").permutation(len(QUERIES)), 0.0
    asked = [QUERIES[turns[number % 3]] for number in range(7)]
    for words, query in zip(drawn, asked, strict=True):
        read = {"input_ids": torch.tensor([[*OPENING, *query]])} | ({"decoder_input_ids": torch.tensor([start])} if start else {})
        log_p = net(**read).logits[0].log_softmax(-1)  # [places, words]
        assert len(words) == len(log_p) == (1 if start else len(OPENING + query))
        expected = expected + sum(gradients(of_place[word], parameters) for of_place, word in zip(log_p, words[:, 0], strict=True)).square()
    torch.testing.assert_close(in_a_row(found), expected / expected.mean(), atol=1e-4, rtol=1e-3)
    assert n_tokens == sum(len(OPENING + query) for query in asked)
    assert all(parameter.grad is None for parameter in parameters)


def test_it_tends_to_the_exact_expectation_over_all_words():
    """1500 samples, 11 words: the sum of all absolute errors is under 8 % of the whole, and each tensor's share is right to 10 %."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2}
    evaluator = evaluator_of(net := network(config("opt", 11, width=8, **shape)))
    parameters, exact = list(net.parameters()), 0.0
    for query in QUERIES:
        log_p = net(torch.tensor([[*OPENING, *query]])).logits[0].log_softmax(-1)  # [places, words]
        for of_place in log_p:
            exact = exact + sum(p.exp().detach() * gradients(p, parameters).square() for p in of_place)
    exact = (exact / exact.mean()).split([p.numel() for p in parameters])
    found, _ = diagonal_fisher(evaluator, parameters, 1500, seed=0)
    away = sum(float((ours.flatten() - theirs).abs().sum()) for ours, theirs in zip(found, exact, strict=True))
    assert away < 0.08 * sum(map(torch.numel, parameters))
    for ours, theirs in zip(found, exact, strict=True):
        assert float(ours.sum()) == pytest.approx(float(theirs.sum()), rel=0.1, abs=1e-3 * float(sum(e.sum() for e in exact)))


def test_dropout_and_the_state_of_torchs_generator_make_no_difference():
    found = []
    for dropout, seed in ((0.0, 1), (0.5, 2)):
        net = network(config("opt", 30, dropout=dropout)).train()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(diagonal_fisher(evaluator_of(net), list(net.parameters()), 4, seed=0)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(in_a_row(found[0]), in_a_row(found[1]))


@pytest.mark.parametrize(("precision", "apart"), [("bf16", 0.2), ("fp16", 0.05)])
def test_half_precision_is_near(precision, apart):
    net = network(config("opt", 30))
    parameters = list(net.parameters())
    full, half = (in_a_row(diagonal_fisher(evaluator_of(net, p), parameters, 30, seed=0)[0]) for p in ("fp32", precision))
    assert (full - half).abs().mean() < apart and half.mean() == pytest.approx(1.0, rel=1e-5)


def test_a_loss_scale_that_is_too_large_for_fp16_is_given_up(monkeypatch):
    net = network(config("opt", 30))
    parameters, found = list(net.parameters()), []
    for scales in ((2.0**5,), (2.0**30, 2.0**5)):
        monkeypatch.setattr(fisher, "LOSS_SCALES", scales)
        found.append(diagonal_fisher(evaluator_of(net, "fp16"), parameters, 4, seed=0))
    (once, n_once), (again, n_again) = found
    assert torch.equal(in_a_row(once), in_a_row(again)) and n_again == 2 * n_once


def test_no_information_at_all_is_a_failure():
    with pytest.raises(TrialFailure, match=r"sums to 0\.0; use the penalty l2_sp"):
        diagonal_fisher(evaluator_of(network(config("opt", 30))), [torch.nn.Parameter(torch.zeros(3))], 2, seed=0)


def test_a_strength_of_zero_is_pattern_based_fine_tuning_to_the_bit(spec_of):
    ours, plain = (
        run_trial(spec_of(name, settings), CPU)
        for name, settings in (("regularised", {"penalty": "ewc", "strength": 0.0}), ("pattern", {}))
    )
    assert ours.predictions == plain.predictions and ours.record.curve == plain.record.curve
    assert ours.record.cost.tokens_trained == plain.record.cost.tokens_trained


def test_a_huge_strength_holds_the_weights_that_matter(spec_of):
    """Those of the most Fisher information stay where they were; those of the least go as far as without a penalty."""
    spec = spec_of("regularised")
    setting = prepare_trial(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        setting.method.prepare(model, 2, torch.Generator())
        evaluator = Evaluator(AdaptedModel(setting.method, model), encode_prompts(spec, setting), setting.words, CPU)
        starts = {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}
        importance = in_a_row(diagonal_fisher(evaluator, list(model.network.parameters()), 200, seed=9)[0])

    def trained(**settings):
        spec = spec_of("regularised", {"penalty": "ewc", **settings}, epochs=10, selections=("last",))
        result = run_trial(spec, replace(CPU, keep_weights=True))
        kept = load(result.weights)
        return result.record.cost.tokens_trained, in_a_row(kept[name] - start for name, start in starts.items()).abs()

    (n_free, free), (n_held, held) = trained(strength=0.0), trained(strength=100.0, n_fisher_samples=20)
    informed = importance[importance > 0]  # nothing is known of places and words that no query has
    most, least = importance > informed.quantile(0.99), (importance > 0) & (importance < informed.quantile(0.02))
    assert held[most].mean() < 0.05 * free[most].mean() and held[least].mean() > 0.5 * free[least].mean()
    lengths = evaluator.encoded.lengths(SHOTS)
    assert 20 * min(lengths) <= n_held - n_free <= 20 * max(lengths)
