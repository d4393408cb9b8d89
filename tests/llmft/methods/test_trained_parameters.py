"""What each method trains on each family of models, by the papers' formulas and the sizes of the untouched network alone."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from support.small_models import OPT_350M, config, network

from llmft.errors import UserError
from llmft.methods._base import Method
from llmft.methods._registry import METHODS, build_method, complete_settings, method_class
from llmft.models.loading import LoadedModel

TRAINED = [name for name in METHODS if method_class(name).trains]
N_WORDS, WIDTH, N_LABELS = 90, 32, 3
IDS = torch.tensor([[5, 30, 9, 20, 7], [9, 8, 7, 6, 5]])

ATTENTION = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "out_proj": (32, 32)}
OPT_BLOCK = ATTENTION | {"fc1": (32, 64), "fc2": (64, 32)}
GROUPED = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
SELF, CROSS = ({f"{kind}.{name}": (32, 32) for name in "qkvo"} for kind in ("self", "cross"))
WIDE = {"wi": (32, 64), "wo": (64, 32)}


@dataclass(frozen=True)
class Sizes:
    """A tiny model by hand.

    Attributes:
        blocks: of each the matrices by name, (in, out).
        lora: the matrices that LoRA adapts unless it is told otherwise.
        scaled, inner: the matrices of which (IA)3 scales the output, and the input.
        n_more: parameters beside words, blocks and norms, such as positions.
        n_final_norms: the norms behind the blocks.
        biases: whether matrices and norms have one.
        tied: whether the words are also the output embedding.
        embedded: the embeddings' width, which is also what the output embedding reads.
        beside: matrices outside of the blocks that are no embeddings.
        cached: the width of a layer's keys (and of its values) in the cache.
    """

    blocks: tuple[dict[str, tuple[int, int]], ...]
    lora: tuple[str, ...]
    scaled: tuple[str, ...]
    inner: str
    n_more: int = 0
    n_final_norms: int = 1
    biases: bool = True
    tied: bool = True
    embedded: int = WIDTH
    beside: tuple[tuple[int, int], ...] = ()
    cached: int = WIDTH

    def matrices(self, *names: str) -> list[tuple[int, int]]:
        """The sizes of those with these names, or of all."""
        return [
            size
            for block in self.blocks
            for name, size in block.items()
            if (name.split(".")[-1] in names if names else name != "distances")
        ]

    def n_sublayers(self, block: dict) -> int:
        """One attention, or two, and a feed-forward part, each with a norm."""
        return 3 if "cross.q" in block else 2

    @property
    def n_norms(self) -> int:
        return sum(map(self.n_sublayers, self.blocks)) + self.n_final_norms

    @property
    def n_attentions(self) -> int:
        return self.n_norms - self.n_final_norms - len(self.blocks)

    @property
    def norm(self) -> int:
        return 2 * WIDTH if self.biases else WIDTH

    @property
    def n_biases(self) -> int:
        return sum(n_out for _, n_out in self.matrices()) + self.n_norms * WIDTH if self.biases else 0

    @property
    def words(self) -> int:
        return N_WORDS * self.embedded

    def block(self, block: dict) -> int:
        matrices = sum(n_in * n_out + (n_out if self.biases else 0) for n_in, n_out in block.values())
        return matrices + self.norm * self.n_sublayers(block)

    @property
    def whole(self) -> int:
        beside = sum(n_in * n_out for n_in, n_out in self.beside) + self.norm * self.n_final_norms + self.n_more
        return self.words * (1 if self.tied else 2) + beside + sum(map(self.block, self.blocks))


GPT2_BLOCK = {"c_attn": (32, 96), "c_proj": (32, 32), "c_fc": (32, 128), "mlp_proj": (128, 32)}
NEOX_BLOCK = {"query_key_value": (32, 96), "dense": (32, 32), "dense_h_to_4h": (32, 64), "dense_4h_to_h": (64, 32)}
LLAMA_BLOCK = GROUPED | {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
DISTANCES = {"distances": (32, 4)}  # T5's table of relative positions, a number for each head, in the first block of a stack
FAMILIES = {
    "opt": Sizes((OPT_BLOCK,) * 2, ("q_proj", "v_proj"), ("k_proj", "v_proj"), "fc2", n_more=514 * 32),
    "opt-350m": Sizes(
        (OPT_BLOCK,) * 2, ("q_proj", "v_proj"), ("k_proj", "v_proj"), "fc2", n_more=514 * 32, n_final_norms=0, embedded=16,
        beside=((16, 32), (32, 16)),
    ),
    "gpt2": Sizes((GPT2_BLOCK,) * 2, ("c_attn",), ("c_attn",), "mlp_proj", n_more=512 * 32),
    "gpt_neox": Sizes((NEOX_BLOCK,) * 2, ("query_key_value",), ("query_key_value",), "dense_4h_to_h", tied=False),
    "llama": Sizes(
        (LLAMA_BLOCK,) * 2, ("q_proj", "v_proj"), ("k_proj", "v_proj"), "down_proj", biases=False, tied=False, cached=16
    ),
    "t5": Sizes(
        (SELF | WIDE | DISTANCES, SELF | WIDE, SELF | CROSS | WIDE | DISTANCES, SELF | CROSS | WIDE), ("q", "v"), ("k", "v"), "wo",
        biases=False, n_final_norms=2,
    ),
}  # fmt: skip
REFUSED = {  # what a family cannot have, and what the one line says
    ("bitfit", "llama"): "'llama' models have too few biases to train",
    ("bitfit", "t5"): "'t5' models have too few biases to train",
    ("bitfit, query_mlp", "gpt2"): "'gpt2' models have no query projection of their own",
    ("bitfit, query_mlp", "gpt_neox"): "'gpt_neox' models have no query projection of their own",
}
IMPOSSIBLE = {("prefix_tuning", "t5")}  # which is refused before there is a network


@cache
def untouched(family: str) -> torch.nn.Module:
    if family == "opt-350m":
        return network(config("opt", N_WORDS, **OPT_350M))
    return network(config(family, N_WORDS))


def prepared(name: str, settings: dict, family: str) -> LoadedModel:
    model = LoadedModel(copy.deepcopy(untouched(family)), torch.device("cpu"), "fp32", plain_head=True)
    build_method(name, settings).prepare(model, N_LABELS, torch.Generator().manual_seed(0))
    return model


def n_trainable(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def new_head(kind: str, width: int) -> int:
    """One matrix without a bias, or two with."""
    return width * N_LABELS if kind == "linear" else width * width + width + width * N_LABELS + N_LABELS


def expected_trainable(name: str, settings: dict, sizes: Sizes) -> int:
    """A new method adds its own line."""
    e = sizes.embedded
    match name:
        case "vanilla":
            return sizes.whole - (0 if sizes.tied else sizes.words) + new_head(settings["head"], e)
        case "pattern" | "regularised" | "finetuned_in_context":
            return sizes.whole
        case "context_distillation" | "sequence_distillation" | "multi_task" | "rationale_tuning":
            return expected_trainable(settings["student"], settings["student_settings"], sizes)
        case "prompt_tuning":
            return settings["n_virtual_tokens"] * e
        case "p_tuning":
            h, k = settings["encoder_width"] or e, settings["n_virtual_tokens"]
            if settings["encoder"] == "mlp":
                return k * e + (e * h + h) + (h * h + h) + (h * e + e)
            first, second = (2 * 4 * h * (n + h + 2) for n in (e, 2 * h))  # two directions, four gates, two biases
            return k * e + first + second + (2 * h * 2 * h + 2 * h) + (2 * h * e + e)
        case "prefix_tuning":
            k, out = settings["n_virtual_tokens"], len(sizes.blocks) * 2 * sizes.cached
            if not settings["reparametrise"]:
                return k * out
            m = settings["encoder_width"]
            return k * sizes.cached + (sizes.cached * m + m) + (m * out + out)
        case "lora" | "qlora":
            everything = settings["targets"] == "all-linear"
            matrices = [*sizes.matrices(), *sizes.beside] if everything else sizes.matrices(*sizes.lora)
            lengths = sum(n_out for _, n_out in matrices) if settings["dora"] else 0
            return sum(settings["r"] * (n_in + n_out) for n_in, n_out in matrices) + lengths
        case "ia3":
            return sum(n_out for _, n_out in sizes.matrices(*sizes.scaled)) + sum(n_in for n_in, _ in sizes.matrices(sizes.inner))
        case "bitfit" if settings["subset"] == "query_mlp":
            return sum(n_out for _, n_out in sizes.matrices("q_proj", "fc1"))
        case "bitfit":
            return sizes.n_biases
        case "head_only":
            return new_head(settings["head"], e)
        case "last_layers":
            last = sum(map(sizes.block, sizes.blocks[-settings["n_layers"] :]))
            return last + (sizes.norm if sizes.n_final_norms else 0)
        case "adapter_houlsby":
            n, norms = settings["bottleneck"], sizes.n_norms * sizes.norm if settings["train_norms"] else 0
            return (sizes.n_attentions + len(sizes.blocks)) * (2 * WIDTH * n + n + WIDTH) + norms
        case "adapter_pfeiffer":
            n = WIDTH // settings["reduction"]
            return len(sizes.blocks) * (2 * WIDTH * n + n + WIDTH)
        case "adapter_parallel":
            n, places = WIDTH // settings["reduction"], {"attention": sizes.n_attentions, "feed_forward": len(sizes.blocks)}
            return sum(m for kind, m in places.items() if settings["beside"] in (kind, "both")) * (2 * WIDTH * n + n + WIDTH)
    raise NotImplementedError(f"say here how many parameters the method {name!r} trains")


VARIANTS = {
    **{name: (name, {}) for name in TRAINED},
    "vanilla, linear": ("vanilla", {"head": "linear"}),
    "lora, rank": ("lora", {"r": 3}),
    "lora, all": ("lora", {"targets": "all-linear"}),
    "lora, dora": ("lora", {"targets": "all-linear", "dora": True}),
    "bitfit, query_mlp": ("bitfit", {"subset": "query_mlp"}),
    "head_only, deep": ("head_only", {"head": "fully_connected"}),
    "last_layers, one": ("last_layers", {"n_layers": 1}),
    "adapter_houlsby, no norms": ("adapter_houlsby", {"train_norms": False}),
    "adapter_parallel, both": ("adapter_parallel", {"beside": "both", "reduction": 4}),
    "adapter_parallel, attention": ("adapter_parallel", {"beside": "attention"}),
    "prompt_tuning, few": ("prompt_tuning", {"n_virtual_tokens": 3, "initialisation": "random"}),
    "p_tuning, narrow": ("p_tuning", {"encoder_width": 20}),
    "p_tuning, lstm": ("p_tuning", {"encoder": "lstm", "encoder_width": 20}),
    "prefix_tuning, few": ("prefix_tuning", {"n_virtual_tokens": 5}),
    "prefix_tuning, encoded": ("prefix_tuning", {"reparametrise": True, "encoder_width": 24}),
    "distilled lora": ("context_distillation", {"student": "lora", "student_settings": {"r": 3}}),
}


def refusal(variant: str, family: str) -> str | None:
    return REFUSED.get((variant, family)) or REFUSED.get((VARIANTS[variant][0], family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_parameters_are_trained_as_the_formula_says(variant, family):
    name, settings = VARIANTS[variant]
    if (name, family) in IMPOSSIBLE:
        return
    if said := refusal(variant, family):
        with pytest.raises(UserError) as raised:
            prepared(name, settings, family)
        assert str(raised.value).startswith(f"method '{name}'") and said in str(raised.value) and "\n" not in str(raised.value)
        return
    expected = expected_trainable(name, complete_settings(name, settings), FAMILIES[family])
    assert n_trainable(prepared(name, settings, family).network) == expected > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_those_of_the_network(family):
    assert FAMILIES[family].whole == sum(parameter.numel() for parameter in untouched(family).parameters())


@torch.no_grad()
def logits(net: torch.nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    return net(input_ids=IDS, use_cache=False, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRAINED)
def test_it_begins_as_the_model_that_it_borrowed_or_says_why_not(name, family):
    """No weight of the base is another; and the answers are the same to the last bit, but behind a prompt that is learned."""
    if refusal(name, family) or (name, family) in IMPOSSIBLE:
        return
    base, model = untouched(family), prepared(name, {}, family)
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.network.named_parameters()}
    assert all(torch.equal(after[name], parameter) for name, parameter in base.named_parameters())
    assert torch.equal(logits(model.network), logits(base))
    if method_class(name).prepend_prompt is not Method.prepend_prompt:
        assert "no identity to begin with" in " ".join(importlib.import_module(f"llmft.methods.{name}").__doc__.split())
