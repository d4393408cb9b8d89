"""Methods that add layers or free a part of the network, on every family of models."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_models import config, network
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.methods.modules.bottleneck import Bottleneck
from llmft.models.architectures import find_blocks, find_sublayers
from llmft.models.loading import LoadedModel

IDS = torch.tensor([[5, 30, 90, 200, 7], [9, 8, 7, 6, 5]])
FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "gpt_neo", "bloom", "t5", "bart")
FINAL_NORM = {
    "opt": "model.decoder.final_layer_norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
}
BEGIN_AS_THE_IDENTITY = [
    ("lora", {}), ("lora", {"targets": "all-linear", "init": "gaussian"}), ("ia3", {}), ("adapter_houlsby", {"bottleneck": 6}),
    ("adapter_pfeiffer", {"reduction": 4}), ("adapter_parallel", {"beside": "both"}),
]  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> torch.nn.Module:
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return T5ForConditionalGeneration(T5Config(vocab_size=600, **sizes)).eval().requires_grad_(False)
    if family == "bart":
        each = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
                (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BartForConditionalGeneration(BartConfig(vocab_size=600, d_model=32, init_std=0.2, **each)).eval().requires_grad_(False)
    if family == "gpt_neo":
        from transformers import GPTNeoConfig

        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        return network(GPTNeoConfig(vocab_size=600, max_position_embeddings=64, **sizes))
    return network(config(family, 600))


def prepared(name: str, settings: dict, net: torch.nn.Module):
    model = LoadedModel(net, torch.device("cpu"), "fp32", plain_head=True)
    build_method(name, settings).prepare(model, 2, torch.Generator().manual_seed(0))
    return net


def logits(net) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    return net(input_ids=IDS, use_cache=False, **more).logits


def trained(net) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def shake(net, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(net).values():
            parameter.add_(torch.empty_like(parameter).normal_(0, by, generator=generator))


@each_family
@pytest.mark.parametrize(("name", "settings"), BEGIN_AS_THE_IDENTITY)
def test_it_begins_as_the_identity_and_everything_trained_matters(family, name, settings):
    net = build(family)
    before, base = logits(net), {name: parameter.clone() for name, parameter in net.named_parameters()}
    prepared(name, settings, net)
    assert torch.equal(logits(net), before)
    shake(net)
    out = logits(net)
    assert (out - before).abs().max() > 0.01
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained(net).values())
    if name == "adapter_houlsby":
        assert any("norm" in name or "ln_" in name for name in trained(net))
    else:
        now = {name.replace(".base_layer", ""): parameter for name, parameter in net.named_parameters()}
        assert all(torch.equal(now[name], parameter) for name, parameter in base.items())
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in trained(net) if "norm" not in name)


@pytest.mark.parametrize("family", FINAL_NORM)
@pytest.mark.parametrize("name", ["adapter_houlsby", "adapter_pfeiffer", "adapter_parallel"])
def test_an_adapter_adds_what_the_paper_says(family, name):
    """In the last block alone, so that what it adds goes straight into the final norm and the head."""
    plain = build(family)
    part = find_sublayers(plain, name)[-1]
    seen = {}
    part.reads.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    part.writes.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    norm = plain.get_submodule(FINAL_NORM[family])
    norm.register_forward_pre_hook(lambda module, inputs: seen.update(residual=inputs[0]))
    logits(plain)
    settings = {"bottleneck": 5} if name == "adapter_houlsby" else {}
    net = prepared(name, settings, build(family))
    adapter = find_sublayers(net, name)[-1].writes.adapter
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    read, scale = (seen["x"], 4.0) if name == "adapter_parallel" else (seen["y"], 1.0)
    inner = read @ adapter.down.weight.T + adapter.down.bias
    inner = torch.nn.functional.gelu(inner) if name == "adapter_houlsby" else inner.clamp(min=0)
    added = scale * (inner @ adapter.up.weight.T + adapter.up.bias)
    expected = plain.get_output_embeddings()(norm(seen["residual"].reshape(added.shape) + added))
    torch.testing.assert_close(logits(net).reshape(expected.shape), expected, atol=2e-5, rtol=1e-5)


def test_adapters_stand_where_the_settings_say():
    for name, settings, places in (
        ("adapter_houlsby", {}, {"self_attn.out_proj", "fc2"}), ("adapter_pfeiffer", {}, {"fc2"}),
        ("adapter_parallel", {}, {"fc2"}), ("adapter_parallel", {"beside": "attention"}, {"self_attn.out_proj"}),
    ):  # fmt: skip
        net = prepared(name, settings, build("opt"))
        found = [name for name, module in net.named_modules() if isinstance(module, Bottleneck)]
        assert {path.split(".", 4)[4].removesuffix(".adapter") for path in found} == places
        assert len(found) == 2 * len(places)


def test_a_decoder_has_two_attentions_and_checkpointing_changes_no_gradient():
    kinds = [part.kind for part in find_sublayers(build("t5"), "any")]
    assert kinds.count("attention") == 2 + 2 * 2 and kinds.count("feed_forward") == 4
    gradients = []
    for checkpointing in (False, True):
        net = prepared("adapter_parallel", {"beside": "both"}, build("gpt_neox"))
        shake(net)
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits(net.train()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained(net).items()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_unknown_family_is_answered_with_the_known():
    net = build("opt")
    net.config.model_type = "rwkv"
    for name in ("adapter_pfeiffer", "ia3"):
        with pytest.raises(UserError, match=rf"method '{name}': the layers of 'rwkv' models .* Known: .*bloom, falcon.* opt"):
            prepared(name, {}, net)


def scaled(weight, bias, by, transposed: bool) -> tuple:
    return weight * (by if transposed else by[:, None]), None if bias is None else bias * by


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama", "t5"])
def test_ia3_is_a_scaling_of_the_weights(family):
    net, by_hand = build(family), build(family)
    prepared("ia3", {}, net)
    shake(net)
    expected = {
        "opt": {"k_proj", "v_proj", "fc2"}, "gpt2": {"c_attn", "c_proj"}, "gpt_neox": {"query_key_value", "dense_4h_to_h"},
        "llama": {"k_proj", "v_proj", "down_proj"}, "t5": {"k", "v", "wo"},
    }[family]  # fmt: skip
    places = {name.split(".ia3_l")[0]: parameter.detach().flatten() for name, parameter in trained(net).items()}
    assert {place.split(".")[-1] for place in places} == expected
    assert not any("attn.c_proj" in place for place in places)
    transposed = family == "gpt2"  # its Conv1D keeps [in, out]
    for place, by in places.items():
        layer = by_hand.get_submodule(place)
        if place.split(".")[-1] in ("fc2", "c_proj", "dense_4h_to_h", "down_proj", "wo"):
            layer.weight.data = layer.weight * (by[:, None] if transposed else by)
        else:
            layer.weight.data, bias = scaled(layer.weight, layer.bias, by, transposed)
            if bias is not None:
                layer.bias.data = bias
    torch.testing.assert_close(logits(net), logits(by_hand), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom", "gpt_neo"])
def test_bitfit_trains_the_biases_and_nothing_else(family):
    net = prepared("bitfit", {}, build(family))
    assert set(trained(net)) == {name for name, _ in net.named_parameters() if name.endswith(".bias")}
    assert len(trained(net)) >= 2 * 4
    logits(net).square().sum().backward()
    for name, bias in trained(net).items():  # attention does not see what all keys have in common
        assert bias.grad.abs().sum() > 0 or "k_proj" in name


def test_bitfits_two_kinds():
    net = prepared("bitfit", {"subset": "query_mlp"}, build("opt"))
    assert {name.split(".", 4)[4] for name in trained(net)} == {"self_attn.q_proj.bias", "fc1.bias"}
    with pytest.raises(UserError, match="'gpt2' models have no query projection of their own"):
        prepared("bitfit", {"subset": "query_mlp"}, build("gpt2"))


@pytest.mark.parametrize("subset", ["all", "query_mlp"])
def test_bitfit_refuses_a_model_without_biases(subset):
    for family in ("llama", "t5"):
        with pytest.raises(UserError, match=f"'{family}' models have too few biases"):
            prepared("bitfit", {"subset": subset}, build(family))


@each_family
def test_the_last_blocks_and_the_last_norm(family):
    net = build(family)
    n_blocks, last = len(find_blocks(net)), find_blocks(net)[-1]
    prepared("last_layers", {"n_layers": 1}, net)
    inside = {id(parameter) for parameter in last.parameters()}
    outside = [name for name, parameter in trained(net).items() if id(parameter) not in inside]
    assert inside <= {id(parameter) for parameter in trained(net).values()}
    expected = FINAL_NORM | {"gpt_neo": "transformer.ln_f", "bloom": "transformer.ln_f", "t5": "decoder.final_layer_norm"}
    assert {name.rsplit(".", 1)[0] for name in outside} == ({expected[family]} if family in expected else set())  # BART has none
    with pytest.raises(UserError, match=rf"n_layers is {n_blocks + 1}, and this model has {n_blocks} blocks"):
        prepared("last_layers", {"n_layers": n_blocks + 1}, net)


def test_loras_variants():
    net = prepared("lora", {"r": 16, "alpha": 8, "rslora": True, "init": "gaussian", "targets": "all-linear"}, build("opt"))
    layer = net.model.decoder.layers[0].fc1
    assert layer.scaling["default"] == pytest.approx(8 / 16**0.5)
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 16, rel=0.15)
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name in trained(net) if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}  # not the head
    dora = prepared("lora", {"dora": True, "targets": ["fc1"]}, copy.deepcopy(build("opt")))
    weight, length = (
        dora.model.decoder.layers[0].fc1.base_layer.weight,
        "model.decoder.layers.0.fc1.lora_magnitude_vector.default.weight",
    )
    torch.testing.assert_close(trained(dora)[length], weight.norm(dim=1))
    torch.testing.assert_close(logits(dora), logits(build("opt")), atol=1e-5, rtol=1e-5)
