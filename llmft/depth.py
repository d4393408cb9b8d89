"""Discriminative learning rates (Howard & Ruder 2018, ULMFiT, section 3.2): the lower a block, the smaller its steps.

With d = `train.layer_decay`, block i of L (from 1, the lowest) has the learning rate times d^(L + 1 - i), so the topmost d, and the
embeddings, with what else stands below the blocks, d^(L + 1). What stands above them has the full rate: the final norm and the head.
So count BEiT (Bao et al. 2022) and timm; ELECTRA has one power more below its head. ULMFiT's factor of 2.6 is d = 0.385.

An output embedding that is tied is the input embedding, and has its rate; one of its own is a head. Of an encoder-decoder model,
encoder and decoder each count from their own top, since every decoder block reads the encoder's last state; the embeddings are below
the taller of the two. What a method adds inside of a block (LoRA, adapters) has the block's rate, anything else that it adds the full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from llmft.architecture import language_model
from llmft.blocks import find_blocks
from llmft.errors import UserError
from llmft.model import BorrowedModel, load_config

if TYPE_CHECKING:
    from llmft.spec import ModelRef


def rate_factors(model: BorrowedModel, decay: float) -> dict[torch.nn.Parameter, float]:
    """By what the learning rate of each parameter is multiplied; 1 where it is not there.

    Raises:
        UserError: transformers does not name the network's blocks.
    """
    if decay == 1:
        return {}
    stacks = _stacks(model.network)
    lowest = decay ** (max(map(len, stacks)) + 1)
    factors = dict.fromkeys(_embeddings(model), lowest)
    for blocks in stacks:
        for place, block in enumerate(reversed(blocks), 1):
            factors |= dict.fromkeys(block.parameters(), decay**place)
    return factors


@lru_cache(maxsize=4)
def check_blocks(ref: ModelRef) -> None:
    """Refuse `train.layer_decay` before the weights are loaded.

    Raises:
        UserError: as `rate_factors`.
    """
    config = load_config(ref)
    with torch.device("meta"):
        _stacks(language_model(config).from_config(config))


def _stacks(network: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """The blocks of the encoder, where there is one, and those of the decoder."""
    blocks = find_blocks(network)
    if not blocks:
        raise UserError(
            f"train.layer_decay: transformers does not name the blocks of {network.config.model_type!r} models. Leave it at 1, or "
            "choose another model."
        )
    read = set(network.get_encoder().modules()) if network.config.is_encoder_decoder else set()
    return [stack for stack in ([b for b in blocks if b in read], [b for b in blocks if b not in read]) if stack]


def _embeddings(model: BorrowedModel) -> Iterator[torch.nn.Parameter]:
    """The base's parameters below the blocks: of words and of places, their norms, and OPT's projection of narrow ones."""
    network = model.network
    words, head = network.get_input_embeddings(), network.get_output_embeddings()
    own_head = {*head.parameters()} - {*words.parameters()}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding) or "embed" in path or path.endswith("project_in"):
            for name, parameter in module.named_parameters(path):
                if name in model.base_names and parameter not in own_head:
                    yield parameter
