"""Learning rates by depth: every parameter's, against lists made by hand."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from support.small_models import ENCODER_DECODERS, OPT_350M, config, network
from support.training import largest_difference, train

from llmft.config.spec import ModelRef, TrainSpec
from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.methods.modules.untied_embeddings import untie_embeddings
from llmft.models.architectures import find_blocks, find_sublayers
from llmft.models.loading import LoadedModel
from llmft.training import loop as training
from llmft.training.optimizers import build_optimizer, layer_lr_factors
from llmft.trial.run import check_spec

D = 0.5
BELOW = {  # of two-layer models, what stands below the blocks; whatever else is outside of them stands above
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "opt-350m": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "model.decoder.project_in.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neo": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight"},
    "gptj": {"transformer.wte.weight"},
    "bloom": {
        "transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.weight",
        "transformer.word_embeddings_layernorm.bias",
    },
    "falcon": {"transformer.word_embeddings.weight"},
    "phi": {"model.embed_tokens.weight"},
    "llama": {"model.embed_tokens.weight"},
    "mistral": {"model.embed_tokens.weight"},
    "qwen2": {"model.embed_tokens.weight"},
    "gemma2": {"model.embed_tokens.weight"},
    "granite": {"model.embed_tokens.weight"},
    "mamba": {"backbone.embeddings.weight"},
    "rwkv": {"rwkv.embeddings.weight"},
    "t5": {"shared.weight"},
    "flan": {"shared.weight"},
    "bart": {
        "model.shared.weight",
        *(f"model.{part}.{name}" for part in ("encoder", "decoder") for name in (
            "embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias")),
    },
}  # fmt: skip


def borrowed(family: str, **changed) -> LoadedModel:
    architecture, of_family = {"opt-350m": ("opt", OPT_350M), **ENCODER_DECODERS}.get(family, (family, {}))
    net = network(config(architecture, 50, **of_family | changed))
    return LoadedModel(copy.deepcopy(net), torch.device("cpu"), "fp32", plain_head=True)


def prepared(family: str, method: str, settings: dict | None = None, **changed) -> LoadedModel:
    model = borrowed(family, **changed)
    build_method(method, settings or {}).prepare(model, 2, torch.Generator().manual_seed(0))
    return model


def factors_of(model: LoadedModel, decay: float = D) -> dict[str, float]:
    found = layer_lr_factors(model, decay)
    return {name: found.get(parameter, 1.0) for name, parameter in model.network.named_parameters()}


def by_hand(name: str, below: set[str]) -> float:
    if block := re.search(r"\.(?:layers|h|block|blocks)\.([01])\.", name):
        return {"1": D, "0": D**2}[block[1]]
    return D**3 if name in below else 1.0


@pytest.mark.parametrize("family", BELOW)
def test_every_parameter_has_the_rate_of_its_depth(family):
    found = factors_of(prepared(family, "pattern"))
    assert found == {name: by_hand(name, BELOW[family]) for name in found}
    above = set() if family == "bart" else {1.0}  # which has neither a final norm nor a head of its own
    assert found.keys() > BELOW[family] and set(found.values()) == above | {D, D**2, D**3}
    head = next((name for name in found if name in ("lm_head.weight", "embed_out.weight", "head.weight")), None)
    assert head is None or found[head] == 1.0  # a tied head is the embedding, and not named again


def test_encoder_and_decoder_count_from_their_own_tops():
    found = factors_of(borrowed("t5", num_decoder_layers=1))
    assert {found[name] for name in found if name.startswith("encoder.block.1.")} == {D}
    assert {found[name] for name in found if name.startswith("encoder.block.0.")} == {D**2}
    assert {found[name] for name in found if name.startswith("decoder.block.0.")} == {D}
    assert found["shared.weight"] == D**3 and found["encoder.final_layer_norm.weight"] == 1.0


@pytest.mark.parametrize("family", ["opt", "t5"])
@pytest.mark.parametrize(
    ("method", "outside"),
    [("lora", 0), ("ia3", 0), ("adapter_houlsby", None), ("prompt_tuning", 1), ("p_tuning", None), ("vanilla", None), ("head_only", 1)],
)
def test_what_is_added_has_the_rate_of_its_block_or_the_full_one(family, method, outside):
    model = prepared(family, method)
    found = factors_of(model)
    added = [name for name, p in model.network.named_parameters() if p.requires_grad and name not in model.base_names]
    assert added and all(found[name] == by_hand(name, set()) for name in added)
    if outside is not None:
        assert sum(found[name] == 1.0 for name in added) == outside
    in_blocks = {found[name] for name in added} - {1.0}
    assert in_blocks == (set() if method in ("prompt_tuning", "p_tuning", "vanilla", "head_only") else {D, D**2})


def test_an_untied_head_has_the_full_rate():
    model = borrowed("opt")
    untie_embeddings(model)
    found = factors_of(model)
    assert (found["model.decoder.embed_tokens.weight"], found["lm_head.weight"]) == (D**3, 1.0)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_each_optimiser_gets_each_rate_once(name):
    model = prepared("gpt2", "pattern")
    found = factors_of(model)
    optimizer = build_optimizer(
        TrainSpec(optimizer=name, learning_rate=0.1, weight_decay=0.3), model.network.parameters(), layer_lr_factors(model, D)
    )
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: rates[p] for name, p in model.network.named_parameters()} == {name: 0.1 * f for name, f in found.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


def test_a_step_is_scaled_by_depth(spec_of):
    one_step = {"optimizer": "sgd", "beta1": 0.0, "clip_norm": None, "epochs": 1, "batch_size": 16, "warmup_ratio": 0.0}
    (whole, even), (result, scaled) = (train(spec_of("pattern", learning_rate=0.1, layer_decay=d, **one_step)) for d in (1.0, D))
    start = dict(transformers.AutoModelForCausalLM.from_pretrained(spec_of("pattern").model.path).named_parameters())
    assert result.n_steps == 1 and [p.learning_rate for p in result.curve] == [p.learning_rate for p in whole.curve] == [0.1]
    moved = 0
    for name in even:
        factor, start_ = by_hand(name, BELOW["opt"]), start[name].detach()
        torch.testing.assert_close(scaled[name], start_ + factor * (even[name] - start_), atol=1e-7, rtol=1e-6)
        moved += not torch.equal(scaled[name], start_)
    assert moved > 0.8 * len(even)


def test_without_decay_the_optimiser_is_a_plain_one(spec_of, monkeypatch):
    spec = spec_of("pattern", weight_decay=0.1, epochs=3, schedule="cosine")
    weights = train(spec)[1]

    def plain(hyper, parameters, factors):
        assert not factors
        return torch.optim.AdamW(
            list(parameters), lr=hyper.learning_rate, weight_decay=hyper.weight_decay, betas=(hyper.beta1, hyper.beta2), eps=hyper.epsilon
        )

    monkeypatch.setattr(training, "build_optimizer", plain)
    assert largest_difference(weights, train(spec)[1]) == 0


def test_the_recorded_rate_is_that_of_the_top(spec_of):
    even, scaled = (train(spec_of("pattern", schedule="cosine", epochs=4, layer_decay=d))[0] for d in (1.0, D))
    assert [p.learning_rate for p in even.curve] == [p.learning_rate for p in scaled.curve]
    assert [p.train_loss for p in even.curve] != [p.train_loss for p in scaled.curve]


def test_a_model_without_named_blocks_is_refused_before_its_weights_are_read(tmp_path, spec_of):
    transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    spec = spec_of("pattern", layer_decay=0.9, model=ModelRef(name="gpt", path=str(tmp_path)))
    with pytest.raises(UserError, match="train.layer_decay: transformers does not name the blocks of 'openai-gpt' models. Leave it at 1"):
        check_spec(spec)


@pytest.mark.parametrize(("family", "n"), [("mamba", 2), ("mbart", 4), ("bart", 4), ("t5", 4), ("opt", 2)])
def test_a_part_of_a_block_is_no_block(family, n):
    """transformers also names the mixer of Mamba's blocks, and the attention of mBART's."""
    made = config("bart", 50) if family == "mbart" else config(family, 50)
    if family == "mbart":
        made = transformers.MBartConfig(**{k: v for k, v in made.to_dict().items() if k != "model_type"})
    net = network(made)
    assert len(find_blocks(net)) == n
    if family != "mamba":
        attentions = [part for part in find_sublayers(net, "lora") if part.kind == "attention"]
        assert len(attentions) == n * 3 // 2 if net.config.is_encoder_decoder else n
