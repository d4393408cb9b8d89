"""Untied embeddings: where input and output embedding are one matrix, the output embedding becomes one of its own."""

from __future__ import annotations

import torch

from llmft.errors import UserError
from llmft.models import LoadedModel


def untie_embeddings(model: LoadedModel) -> None:
    """Give the network an output embedding apart from the input embedding, with the same values, so that no answer changes.

    Raises:
        UserError: they are apart already.
    """
    network = model.network
    words, head = network.get_input_embeddings(), network.get_output_embeddings()
    if head.weight is not words.weight:
        raise UserError(
            f"untie_embeddings: there is nothing to untie, this {network.config.model_type!r} model has an output embedding of its own. "
            "Use false."
        )
    head.weight = torch.nn.Parameter(words.weight.detach().clone(), requires_grad=words.weight.requires_grad)
    network.config.tie_word_embeddings = False
    model.base_names |= {name for name, parameter in network.named_parameters() if parameter is head.weight}
