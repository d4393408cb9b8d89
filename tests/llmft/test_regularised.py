"""The penalties of regularised fine-tuning, and the distance from the start, against computations by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from small_models import CPU
from transformers import AutoModelForCausalLM

from llmft.adapted import Adapted
from llmft.batches import make_batch
from llmft.evaluate import Evaluator
from llmft.model import borrow_model
from llmft.registry import METHODS, build_method, method_class
from llmft.seeds import derive
from llmft.setting import SHOTS, encode_prompts, settle
from llmft.start import Start
from llmft.trial import run_trial


def test_the_pull_is_the_gradient_of_l2_sp():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    frozen = torch.nn.Parameter(torch.ones(2))  # without a gradient, and so never moved
    start = Start(weights | {"c": frozen}, CPU)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator))
    penalty = 0.3 / 2 * sum((weight - before[name]).square().sum() for name, weight in weights.items())
    expected = torch.autograd.grad(penalty, list(weights.values()))
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    start.pull(0.3)
    for weight, gradient in zip(weights.values(), expected, strict=True):
        torch.testing.assert_close(weight.grad, 1 + gradient)
    assert frozen.grad is None
    assert start.distance() == pytest.approx(float((2 * penalty.detach() / 0.3).sqrt()), rel=1e-6)


def test_kl_to_base_by_hand(spec_of):
    spec = spec_of("regularised", {"penalty": "kl_to_base", "strength": 0.7, "loss": "restricted"}, n_shots=6)
    setting = settle(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        method = setting.method
        method.prepare(model, 2, torch.Generator().manual_seed(0))
        encoded = encode_prompts(spec, setting)
        adapted = Adapted(method, model)
        evaluator = Evaluator(adapted, encoded, setting.words, replace(CPU, micro_batch_tokens=50))  # several batches
        with torch.no_grad():
            method.begin(adapted, evaluator.every(SHOTS))
        batch = make_batch(encoded.sets[SHOTS], [4, 1, 5], setting.words, model, opening=encoded.prefix)
        pattern = build_method("pattern", {"loss": "restricted"})
        torch.testing.assert_close(adapted("loss", batch), pattern.loss(model, batch), atol=1e-5, rtol=0)  # nothing has moved
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        base, divergences = AutoModelForCausalLM.from_pretrained(spec.model.path).eval(), []
        with torch.no_grad():
            for i in (4, 1, 5):
                ids = torch.tensor([[*encoded.prefix, *encoded.sets[SHOTS].suffixes[i]]])
                p, q = (net(ids).logits[0, -1].log_softmax(-1) for net in (base, model.network))
                divergences.append(float((p.exp() * (p - q)).sum()))
        penalty = float((adapted("loss", batch) - pattern.loss(model, batch)).detach())
    assert penalty == pytest.approx(0.7 * sum(divergences) / 3, rel=1e-3) and penalty > 0.01


@pytest.mark.parametrize("penalty", ["l2_sp", "kl_to_base"])
def test_a_strength_of_zero_is_pattern_based_fine_tuning(spec_of, penalty):
    ours, plain = (
        run_trial(spec_of(name, settings), CPU).record
        for name, settings in (("regularised", {"penalty": penalty, "strength": 0.0}), ("pattern", {}))
    )
    assert [p.train_loss for p in ours.curve] == pytest.approx([p.train_loss for p in plain.curve], abs=1e-5)
    assert ours.trained_distance["last"] == pytest.approx(plain.trained_distance["last"], rel=1e-3)


@pytest.mark.parametrize(("penalty", "strength"), [("l2_sp", 100.0), ("kl_to_base", 10.0)])
def test_a_strong_penalty_keeps_the_model_near(spec_of, penalty, strength):
    near, far = (
        run_trial(spec_of("regularised", {"penalty": penalty, "strength": s}, epochs=6), CPU).record for s in (strength, 0.0)
    )
    assert near.trained_distance["last"] < 0.8 * far.trained_distance["last"]
    assert near.curve[-1].train_loss > far.curve[-1].train_loss


@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).trains])
def test_the_distance_from_the_start_is_in_every_record(spec_of, name):
    spec = spec_of(name, selections=("last",))
    result = run_trial(spec, replace(CPU, keep_weights=True))
    assert set(result.record.trained_distance) == {"last"}
    setting, kept = settle(spec), load(result.weights)
    with borrow_model(spec.model, "fp32", torch.device("cpu"), base_weights=setting.method.base_weights) as model:
        setting.method.prepare(model, 2, torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        start = {name: parameter.detach() for name, parameter in model.network.named_parameters()}
        if kept.keys() <= start.keys():  # else it was folded
            expected = sum(float((kept[name] - start[name]).double().square().sum()) for name in kept) ** 0.5
            assert result.record.trained_distance["last"] == pytest.approx(expected, rel=1e-5)
    assert result.record.trained_distance["last"] > 0


def test_each_checkpoint_has_its_distance(spec_of):
    spec = spec_of("pattern", selections=("last", "best_dev"), epochs=8, learning_rate=1e-2, n_dev=10).with_seed(1)
    record = run_trial(spec, CPU).record
    assert record.selected_step["best_dev"] < record.selected_step["last"]
    assert 0 < record.trained_distance["best_dev"] < record.trained_distance["last"]
