"""Optimizers, and discriminative learning rates (Howard & Ruder 2018, ULMFiT, section 3.2): the lower a block, the smaller its steps.

With d = `train.layer_decay`, block i of L (from 1, the lowest) has the learning rate times d^(L + 1 - i), so the topmost d, and the
embeddings, with what else stands below the blocks, d^(L + 1). What stands above them has the full rate: the final norm and the head.
So count BEiT (Bao et al. 2022) and timm; ELECTRA has one power more below its head. ULMFiT's factor of 2.6 is d = 0.385.

An output embedding that is tied is the input embedding, and has its rate; one of its own is a head. Of an encoder-decoder model,
encoder and decoder each count from their own top, since every decoder block reads the encoder's last state; the embeddings are below
the taller of the two. What a method adds inside of a block (LoRA, adapters) has the block's rate, anything else that it adds the full one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from llmft.config import TrainSpec
from llmft.errors import UserError
from llmft.models import LoadedModel, check_bitsandbytes, find_blocks, language_model, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmft.config import ModelRef


def layer_lr_factors(model: LoadedModel, decay: float) -> dict[torch.nn.Parameter, float]:
    """Compute what the learning rate of each parameter is multiplied by; 1 where it is not there.

    Raises:
        UserError: transformers does not name the network's blocks.
    """
    if decay == 1:
        return {}
    stacks = _stacks(model.network)
    lowest = decay ** (max(map(len, stacks)) + 1)
    factors = dict.fromkeys(_embeddings(model), lowest)
    for blocks in stacks:
        for depth, block in enumerate(reversed(blocks), 1):
            factors |= dict.fromkeys(block.parameters(), decay**depth)
    return factors


@lru_cache(maxsize=4)
def check_blocks(ref: ModelRef) -> None:
    """Refuse `train.layer_decay` before the weights are loaded.

    Raises:
        UserError: as `layer_lr_factors`.
    """
    config = load_config(ref)
    with torch.device("meta"):
        _stacks(language_model(config).from_config(config))


def _stacks(network: PreTrainedModel) -> list[list[torch.nn.Module]]:
    """The blocks of the encoder, where there is one, and those of the decoder."""
    blocks = find_blocks(network)
    if not blocks:
        raise UserError(
            f"train.layer_decay: transformers does not name the blocks of {network.config.model_type!r} models. Leave it at 1, or "
            "choose another model."
        )
    read = set(network.get_encoder().modules()) if network.config.is_encoder_decoder else set()
    return [stack for stack in ([b for b in blocks if b in read], [b for b in blocks if b not in read]) if stack]


def _embeddings(model: LoadedModel) -> Iterator[torch.nn.Parameter]:
    """The base's parameters below the blocks: of tokens and positions, their norms, and OPT's projection of narrow ones."""
    network = model.network
    words, head = network.get_input_embeddings(), network.get_output_embeddings()
    own_head = {*head.parameters()} - {*words.parameters()}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding) or "embed" in path or path.endswith("project_in"):
            for name, parameter in module.named_parameters(path):
                if name in model.base_names and parameter not in own_head:
                    yield parameter


def build_optimizer(
    train: TrainSpec, parameters: Iterable[torch.nn.Parameter], factors: Mapping[torch.nn.Parameter, float]
) -> torch.optim.Optimizer:
    """Build the optimizer of a training.

    `adamw` is Loshchilov & Hutter 2019; `adamw_8bit` keeps its moments in 8 bits (Dettmers et al. 2022); `adafactor` (Shazeer &
    Stern 2018) is PyTorch's, with the learning rate as given and none of `beta1`, `beta2` and `epsilon`; `sgd` has `beta1` as its
    momentum.

    Args:
        factors: by what the learning rate of a parameter is multiplied; 1 where it is not there.

    Raises:
        UserError: the parameters are shards, and the optimizer needs whole ones.
    """
    parameters = list(parameters)
    if train.optimizer not in ("adamw", "sgd") and any(hasattr(parameter, "to_local") for parameter in parameters):
        raise UserError(f"train.optimizer: {train.optimizer} does not step on the shards of a model. Use adamw or sgd, or parallel: ddp.")
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    groups = [{"params": group, "lr": train.learning_rate * factor} for factor, group in by_factor.items()]
    rate, decay, betas = train.learning_rate, train.weight_decay, (train.beta1, train.beta2)
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, betas=betas, eps=train.epsilon)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, weight_decay=decay, momentum=train.beta1)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, lr=rate, weight_decay=decay, betas=betas, eps=train.epsilon)


def check_optimizer(train: TrainSpec, device: torch.device) -> None:
    """Check that the optimizer runs on this device.

    Raises:
        UserError: it does not.
    """
    if train.optimizer == "adamw_8bit":
        check_bitsandbytes("train.optimizer: adamw_8bit")
        if device.type != "cuda":
            raise UserError(f"train.optimizer: adamw_8bit needs a CUDA device, and this is {device.type}. Use adamw.")


def state_bytes(train: TrainSpec, parameter: torch.Tensor) -> int:
    """Compute the bytes that the optimizer keeps for a parameter in fp32."""
    n, shape = parameter.numel(), parameter.shape
    match train.optimizer:
        case "adamw":
            return 2 * 4 * n
        case "sgd":
            return 4 * n if train.beta1 else 0
        case "adafactor":  # of a matrix only the sums of its rows and columns
            return 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        case "adamw_8bit":  # in blocks of 256 with a scale each; small tensors stay in fp32
            return 2 * (4 * n if n < 4096 else n + n // 64)
