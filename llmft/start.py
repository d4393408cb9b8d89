"""Where the trained weights were before training: how far they have moved, and what pulls them back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from llmft.distributed import is_sharded, shard_of
from llmft.runtime import Runtime


class Start:
    """A copy of the trained weights, of this process's shards, in the host's memory: no device holds them twice."""

    def __init__(self, trainable: Mapping[str, torch.nn.Parameter], runtime: Runtime):
        self.runtime, self.pairs = runtime, [(p, shard_of(p).to("cpu", copy=True)) for p in trainable.values()]

    def distance(self) -> float:
        """The L2 distance of all trained weights from their start; every process must call this."""
        whole = in_shards = 0.0
        for parameter, start in self.pairs:
            away = shard_of(parameter) - start.to(parameter.device)
            square = away.square_().sum(dtype=torch.float64).item()
            if is_sharded(parameter):
                in_shards += square
            else:
                whole += square
        return math.sqrt(whole + self.runtime.mean(in_shards) * self.runtime.world_size)

    def pull(self, strength: float) -> None:
        """Add the gradient of strength / 2 times the squared distance (L2-SP, Li et al. 2018) to the gradients that there are.

        Weights without a gradient were not moved by the optimiser either, and stand where they started.
        """
        for parameter, start in self.pairs:
            if parameter.grad is not None:
                away = shard_of(parameter) - start.to(parameter.device)
                shard_of(parameter.grad).add_(away, alpha=strength)
