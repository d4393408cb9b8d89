"""Base models whose linear layers are held in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util

from llmft.errors import UserError


def check_bitsandbytes(what: str) -> None:
    """Find out early whether bitsandbytes is there.

    Raises:
        UserError: it is not; the line begins with `what` needs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes, which is not installed here: pip install 'llmft[qlora]'.")


def keep_packing(network) -> None:
    """Have bitsandbytes leave the weights in the order in which it packed them.

    On some CPUs it would put them into another one in the first forward pass without gradients, which a GPU cannot read.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def nf4():
    """What transformers shall do with the linear layers: NF4 in blocks of 64, scales quantised again, products in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
