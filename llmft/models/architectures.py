"""What differs between the architectures of transformers, as a configuration or a network tells it.

Of T5 one should know besides: it overflows in fp16 (bf16 works); its tokenizer reads all white space alike, so that a newline in a
pattern or a separator becomes a space; nothing but `max_length` bounds its prompts, although it was trained on 512 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmft.errors import UserError

DROPOUT = {  # the names of the hidden dropout, by architecture: OPT ignores `hidden_dropout_prob`
    "opt": ("dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop"),
    "gpt_neo": ("resid_dropout", "embed_dropout"),
    "gpt_neox": ("hidden_dropout",),
    "gptj": ("resid_pdrop", "embd_pdrop"),
    "bloom": ("hidden_dropout",),
    "falcon": ("hidden_dropout",),
    "phi": ("resid_pdrop", "embd_pdrop"),
    "stablelm": ("hidden_dropout",),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), ("dropout_rate",)),
    **dict.fromkeys(("bart", "mbart", "pegasus", "pegasus_x", "led"), ("dropout",)),
}


def language_model(config):
    """The class of transformers that loads the model: with an encoder where its configuration says so, else causal."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def decoder_start_token(config, name: str) -> int | None:
    """The token that the decoder of the encoder-decoder model `name` begins with; None for a causal model.

    Raises:
        UserError: the configuration does not say.
    """
    if not config.is_encoder_decoder:
        return None
    if (start := getattr(config, "decoder_start_token_id", None)) is None:
        raise UserError(
            f"model: the config.json of {name} has an encoder and a decoder, but no decoder_start_token_id. Add the token that its "
            "decoder was trained to begin with (T5: that of <pad>)."
        )
    return start


def shares_prefix(config) -> bool:
    """Whether what opens every prompt can be encoded once, as keys and values.

    Not where an encoder reads to both sides, nor where a recurrent state stands for the past (Mamba, RWKV, hybrids).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    network = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return not (config.is_encoder_decoder or getattr(network, "_is_stateful", False))


def last_states(network, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [rows, length, width], of plain token ids, which encoder and decoder both read."""
    if not network.config.is_encoder_decoder:
        return network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    encoded = network.get_encoder()(input_ids=ids).last_hidden_state
    return network.get_decoder()(input_ids=ids, encoder_hidden_states=encoded, use_cache=False).last_hidden_state


def own_logits(network, ids: torch.Tensor) -> torch.Tensor:
    """The logits, [rows, length, vocabulary], that the network's own forward makes of the same."""
    decoder = {"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}
    return network(input_ids=ids, use_cache=False, **decoder).logits


@dataclass(frozen=True)
class Names:
    """Names of the linear layers of a block, as the ends of their dotted paths.

    Attributes:
        attention, feed_forward: (the first, which reads the sublayer's input; the last, which writes its output). There may be
            several such pairs: a decoder of an encoder-decoder model has two attentions.
        key, value: the projections to keys and values; one name for both where they are fused.
    """

    attention: tuple[tuple[str, str], ...]
    feed_forward: tuple[tuple[str, str], ...]
    key: str
    value: str


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward part of one block: the layer that reads its input, the one that writes its output."""

    kind: str
    reads: torch.nn.Module
    writes: torch.nn.Module


_LLAMA = Names((("q_proj", "o_proj"),), (("gate_proj", "down_proj"),), "k_proj", "v_proj")
_OPT = Names((("q_proj", "out_proj"),), (("fc1", "fc2"),), "k_proj", "v_proj")
_FUSED = (("dense_h_to_4h", "dense_4h_to_h"),)
_T5 = Names(
    (("SelfAttention.q", "SelfAttention.o"), ("EncDecAttention.q", "EncDecAttention.o")),
    (("DenseReluDense.wi", "DenseReluDense.wo"), ("DenseReluDense.wi_0", "DenseReluDense.wo")),
    "k",
    "v",
)
_BART = Names(
    (("self_attn.q_proj", "self_attn.out_proj"), ("encoder_attn.q_proj", "encoder_attn.out_proj")),
    (("fc1", "fc2"),),
    "k_proj",
    "v_proj",
)
FAMILIES = {
    "opt": _OPT,
    "gpt2": Names((("attn.c_attn", "attn.c_proj"),), (("mlp.c_fc", "mlp.c_proj"),), "attn.c_attn", "attn.c_attn"),
    "gpt_neo": Names((("attention.q_proj", "attention.out_proj"),), (("mlp.c_fc", "mlp.c_proj"),), "k_proj", "v_proj"),
    "gpt_neox": Names((("query_key_value", "attention.dense"),), _FUSED, "query_key_value", "query_key_value"),
    "gptj": Names((("q_proj", "out_proj"),), (("fc_in", "fc_out"),), "k_proj", "v_proj"),
    "bloom": Names((("query_key_value", "self_attention.dense"),), _FUSED, "query_key_value", "query_key_value"),
    "falcon": Names((("query_key_value", "self_attention.dense"),), _FUSED, "query_key_value", "query_key_value"),
    "phi": Names((("q_proj", "self_attn.dense"),), (("fc1", "fc2"),), "k_proj", "v_proj"),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "granite", "olmo", "olmo2",
                     "stablelm", "smollm3"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
}  # fmt: skip


def names_in(network, method: str) -> Names:
    """The row of `FAMILIES` for a network.

    Raises:
        UserError: its family has none; the line names `method`.
    """
    family = network.config.model_type
    if family not in FAMILIES:
        raise UserError(
            f"method '{method}': the layers of {family!r} models are not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Choose another model or method, or add a row to llmft/models/architectures.py."
        )
    return FAMILIES[family]


def find_blocks(network) -> list[torch.nn.Module]:
    """The transformer blocks in their order (an encoder's first), by the class names that transformers gives; empty if it gives none."""
    names, blocks, inside = set(network._no_split_modules or ()), [], set()
    for module in network.modules():  # a sharded module has a class of its own, derived from the one that it had
        if module not in inside and names & {cls.__name__ for cls in type(module).__mro__}:
            blocks.append(module)
            inside.update(module.modules())  # transformers also names parts of blocks (Mamba, mBART)
    return blocks


def is_norm(module) -> bool:
    """Whether a module is a layer norm of some kind."""
    return type(module).__name__.endswith("Norm")


def find_sublayers(network, method: str) -> list[Sublayer]:
    """Every attention and feed-forward part of every block, in their order.

    Raises:
        UserError: the family is not known, or a block has other layers than its family's; the line names `method`.
    """
    names, found, blocks = names_in(network, method), [], find_blocks(network)
    for block in blocks:
        layers = dict(block.named_modules())
        parts = [
            Sublayer(kind, layers[read], layers[written])
            for kind in ("attention", "feed_forward")
            for reads, writes in getattr(names, kind)
            if (read := _ending(layers, reads)) and (written := _ending(layers, writes))
        ]
        if {part.kind for part in parts} != {"attention", "feed_forward"}:
            raise UserError(
                f"method '{method}': a block of this {network.config.model_type!r} model has other layers than "
                f"{names.attention} and {names.feed_forward}. Choose another model or method."
            )
        found += parts
    if not blocks:
        raise UserError(f"method '{method}': transformers does not name the blocks of {network.config.model_type!r} models.")
    return found


def _ending(layers, name: str) -> str | None:
    return next((path for path in layers if f".{path}".endswith(f".{name}")), None)
