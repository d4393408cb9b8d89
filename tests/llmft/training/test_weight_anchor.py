"""How far the base's weights have moved, and what pulls them back, against computations by hand and peft's own merger."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from support.small_models import CPU, config, network

from llmft.methods._registry import METHODS, build_method, method_class
from llmft.methods.modules.peft_layers import merge
from llmft.models.loading import LoadedModel, borrow_model
from llmft.training.weight_anchor import WeightAnchor
from llmft.trial.run import run_trial

ADDS_PARTS_ALONE = {"adapter_parallel", "adapter_pfeiffer", "head_only", "p_tuning", "prefix_tuning", "prompt_tuning"}


@pytest.mark.parametrize("weighed", [False, True])
def test_the_pull_is_the_gradient_of_its_penalty(weighed):
    """L2-SP, and with an importance of each weight EWC."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (3, 4), "b": (5,), "without_gradient": (2,), "new": (3,)}
    weights = torch.nn.ParameterDict({name: torch.randn(shape, generator=generator) for name, shape in sizes.items()})
    start = WeightAnchor(weights, {"a", "b", "without_gradient"}, CPU)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name in ("a", "b", "new"):
            weights[name].add_(torch.randn(sizes[name], generator=generator))
    distance = {name: (weights[name] - before[name]).square() for name in ("a", "b")}
    if weighed:
        start.importance = [torch.rand(sizes[name], generator=generator) for name in ("a", "b", "without_gradient")]
    counts = start.importance or [1.0, 1.0]
    penalty = 0.3 / 2 * sum((count * of_one).sum() for count, of_one in zip(counts, distance.values(), strict=False))
    expected = torch.autograd.grad(penalty, [weights["a"], weights["b"]])
    for name in ("a", "b", "new"):
        weights[name].grad = torch.ones_like(weights[name])
    start.add_penalty_gradient(0.3)
    for name, gradient in zip(("a", "b"), expected, strict=True):
        torch.testing.assert_close(weights[name].grad, 1 + gradient)
    assert weights["without_gradient"].grad is None and torch.equal(weights["new"].grad, torch.ones(3))
    assert start.distance() == pytest.approx(float(sum(of_one.detach().sum() for of_one in distance.values()).sqrt()), rel=1e-6)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("lora", {"r": 3, "alpha": 5}), ("lora", {"targets": "all-linear", "rslora": True}), ("ia3", {}),
     ("lora", {"targets": "all-linear", "dora": True, "alpha": 3})],
)  # fmt: skip
def test_an_adapter_has_moved_the_weights_as_far_as_its_merger_does(family, name, settings):
    plain = network(config(family, 90))
    model = LoadedModel(copy.deepcopy(plain), torch.device("cpu"), "fp32", plain_head=True)
    build_method(name, settings).prepare(model, 2, torch.Generator().manual_seed(0))
    start = WeightAnchor(model.network, model.base_names, CPU)
    assert start.distance() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    found = start.distance()
    merge(model.network)
    merged = dict(model.network.named_parameters())
    assert found == pytest.approx(distance(merged, dict(plain.named_parameters())), rel=1e-5) and found > 0.1


def distance(weights, others) -> float:
    return math.sqrt(sum(float((weights[name] - others[name]).detach().double().square().sum()) for name in others))


@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).trains])
def test_it_is_in_every_record(spec_of, name):
    if method_class(name).base_weights != "fp32":
        pytest.importorskip("bitsandbytes")
    spec = spec_of(name, selections=("last",))
    result = run_trial(spec, replace(CPU, keep_weights=True))
    assert set(result.record.weight_distance) == {"last"}
    moved = result.record.weight_distance["last"]
    assert (moved == 0) == (name in ADDS_PARTS_ALONE)
    with borrow_model(spec.model, "fp32", torch.device("cpu"), copied=False) as model:
        base = dict(model.network.named_parameters())
    kept = {key: tensor for key, tensor in load(result.weights).items() if key in base}
    if kept:  # else it is an adapter
        assert moved == pytest.approx(distance(kept, {key: base[key] for key in kept}), rel=1e-5)


@pytest.mark.parametrize("name", ["pattern", "lora"])
def test_each_selection_has_its_own(spec_of, name):
    every = ("last", "best_dev", "best_in_domain", "best_out_of_domain")
    spec = spec_of(name, selections=every, epochs=8, learning_rate=1e-2, n_dev=10).with_seed(1)
    record = run_trial(spec, CPU).record
    steps, moved = record.selected_step, record.weight_distance
    assert moved.keys() == set(every) and steps["best_dev"] < steps["last"]
    assert {moved[one] == pytest.approx(moved[other], rel=1e-6) for one in every for other in every if steps[one] == steps[other]} == {True}
    assert all(0 < moved[name] < moved["last"] for name in every if steps[name] < steps["last"])


def test_what_trains_nothing_moves_nothing(spec_of):
    assert run_trial(spec_of("in_context", selections=("none",)), CPU).record.weight_distance == {"none": 0.0}
