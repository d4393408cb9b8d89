"""Bottleneck adapters: y + scale * W_up f(W_down x), small two-layer networks inside of the blocks.

A sequential adapter reads what a sublayer writes (x = y), a parallel one what the sublayer reads. It is a child of the layer
that writes the sublayer's output, and a forward hook of that layer adds its output: so no layer of the network changes its
name or class, whatever the architecture, and the adapter lies inside of the block, where sharding and checkpointing look for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmft.models import find_sublayers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """scale * W_up f(W_down x) for x of [..., width]. With W_up = 0, as it begins, it adds exactly nothing.

    Args:
        width, bottleneck: sizes of the two layers.
        activation: f, by its name in `ACTIVATIONS`.
        scale: a constant factor.
        generator: draws W_down, uniform as in a linear layer of PyTorch. Biases begin at 0.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, scale: float, generator: torch.Generator):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation, self.scale = ACTIVATIONS[activation](), scale
        self.read: torch.Tensor | None = None  # a parallel adapter's input, between the sublayer's first layer and its last
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(self.activation(self.down(x)))


def insert(
    network: PreTrainedModel,
    method: str,
    kinds: tuple[str, ...],
    size: int,
    generator: torch.Generator,
    *,
    activation: str = "relu",
    scale: float = 1.0,
    parallel: bool = False,
) -> None:
    """Add an adapter to every sublayer of these kinds, and leave `requires_grad` on the adapters alone.

    Args:
        kinds: of `llmft.models.architectures.Sublayer`.
        size: the width in the middle.

    Raises:
        UserError: the network's layers are not known; the line names `method`.
    """
    network.requires_grad_(False)
    for sublayer in find_sublayers(network, method):
        if sublayer.kind in kinds:
            writes: Any = sublayer.writes
            writes.adapter = Bottleneck(network.config.hidden_size, size, activation, scale, generator)
            if parallel:
                sublayer.reads.register_forward_pre_hook(_Remember(writes))
                writes.register_forward_hook(_add_beside)
            else:
                writes.register_forward_hook(_add_after)


def _add_after(layer: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output + layer.adapter(output)


def _add_beside(layer: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    read, layer.adapter.read = layer.adapter.read, None
    return output + layer.adapter(read)


class _Remember:
    """Passes the input of a sublayer's first layer to the adapter of its last."""

    def __init__(self, writes: Any):
        self.writes = writes

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.writes.adapter.read = inputs[0]
