"""What differs between the architectures of transformers, as a configuration or a network tells it.

Of T5 one should know besides: it overflows in fp16 (bf16 works); its tokenizer reads all white space alike, so that a newline in a
pattern or a separator becomes a space; nothing but `max_length` bounds its prompts, although it was trained on 512 tokens.
"""

from __future__ import annotations

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
