"""Base models whose linear layers are held in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util

from llmft.errors import UserError

BLOCK = 64
"""Numbers that share a scale; bitsandbytes' default and the paper's."""


def check_bitsandbytes(what: str) -> None:
    """Find out early whether bitsandbytes is there.

    Raises:
        UserError: it is not; the line begins with `what` needs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes, which is not installed here: pip install 'llmft[qlora]'.")


def check_quantized(network) -> None:
    """Make sure of layers that bitsandbytes holds in 4 bits, where there are any, before their first forward pass.

    They keep the order in which they were packed: on some CPUs bitsandbytes would change it in a pass without gradients, and a GPU
    could not read them then.

    Raises:
        UserError: a layer reads a width that is no multiple of a block's 64 numbers; on CPUs bitsandbytes unpacks it wrongly.
    """
    for name, module in network.named_modules():
        if type(module).__name__ == "Linear4bit":
            if module.in_features % BLOCK:
                raise UserError(
                    f"model: {name} reads {module.in_features} numbers, and in 4 bits that must be a multiple of {BLOCK}. Use lora."
                )
            module.support_avx512bf16_for_cpu = False


def nf4():
    """What transformers shall do with the linear layers: NF4 in blocks of 64, scales quantised again, products in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
