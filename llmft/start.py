"""Where the base model's weights were before training: how far they have moved, and what pulls them back."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from llmft.distributed import is_sharded, shard_of
from llmft.evaluate import Evaluator
from llmft.fisher import diagonal_fisher
from llmft.injection import merger_moves
from llmft.runtime import Runtime


class Start:
    """A copy of those of the base's weights that are trained, of this process's shards, in the host's memory: no device holds them
    twice.

    Attributes:
        importance: what each of these weights counts in the pull, as large as the copy; None: all count alike.
    """

    def __init__(self, network: torch.nn.Module, base_names: Collection[str], runtime: Runtime):
        """`base_names` are the parameters that the network had before a method prepared it."""
        self.network, self.runtime = network, runtime
        self.pairs = [
            (parameter, shard_of(parameter).to("cpu", copy=True))
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name in base_names
        ]
        self.importance: list[torch.Tensor] | None = None

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

    def weigh(self, evaluator: Evaluator, n_samples: int, seed: int) -> int:
        """Let each weight count in the pull by its Fisher information; gives the tokens that were read for it.

        Args and raises as `diagonal_fisher`, whose `parameters` are those that are pulled.
        """
        self.importance, n_tokens = diagonal_fisher(evaluator, [parameter for parameter, _ in self.pairs], n_samples, seed)
        return n_tokens

    def pull(self, strength: float) -> None:
        """Add the gradient of strength / 2 times the squared distance (L2-SP, Li et al. 2018; weighed by the `importance`, EWC) to the
        gradients that there are.

        Weights without a gradient were not moved by the optimiser either, and stand where they started.
        """
        for i, (parameter, start) in enumerate(self.pairs):
            if parameter.grad is not None:
                away = shard_of(parameter) - start.to(parameter.device)
                if self.importance is not None:
                    away.mul_(self.importance[i].to(parameter.device))
                shard_of(parameter.grad).add_(away, alpha=strength)


def _square(away: torch.Tensor) -> float:
    return away.float().square_().sum(dtype=torch.float64).item()
