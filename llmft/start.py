"""Where the base model's weights were before training: how far they have moved, and what pulls them back."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from llmft.distributed import is_sharded, shard_of
from llmft.injection import merger_moves
from llmft.runtime import Runtime


class Start:
    """A copy of those of the base's weights that are trained, of this process's shards, in the host's memory: no device holds them
    twice."""

    def __init__(self, network: torch.nn.Module, base_names: Collection[str], runtime: Runtime):
        """`base_names` are the parameters that the network had before a method prepared it."""
        self.network, self.runtime = network, runtime
        self.pairs = [
            (parameter, shard_of(parameter).to("cpu", copy=True))
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name in base_names
        ]

    @torch.no_grad()
    def distance(self) -> float:
        """How far the base's weights have moved, as a Euclidean distance; every process must call this.

        An adapter that can be merged counts as merged: for LoRA, the norm of all (alpha / r) B A. What has no counterpart in the
        base (a new head, a soft prompt, a bottleneck) does not count.
        """
        in_all = in_shards = 0.0
        for parameter, start in self.pairs:
            square = _square(shard_of(parameter) - start.to(parameter.device))
            if is_sharded(parameter):
                in_shards += square
            else:
                in_all += square
        in_all += sum(_square(away) for away in merger_moves(self.network))
        return math.sqrt(in_all + self.runtime.mean(in_shards) * self.runtime.world_size)

    def pull(self, strength: float) -> None:
        """Add the gradient of strength / 2 times the squared distance (L2-SP, Li et al. 2018) to the gradients that there are.

        Weights without a gradient were not moved by the optimiser either, and stand where they started.
        """
        for parameter, start in self.pairs:
            if parameter.grad is not None:
                away = shard_of(parameter) - start.to(parameter.device)
                shard_of(parameter.grad).add_(away, alpha=strength)


def _square(away: torch.Tensor) -> float:
    return away.float().square_().sum(dtype=torch.float64).item()
