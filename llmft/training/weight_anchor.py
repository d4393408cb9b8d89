"""The distance of the weights from their start, as a penalty (L2-SP, EWC) and in the record, and the diagonal Fisher information."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmft.errors import Cause, TrialFailure
from llmft.evaluation import Evaluator
from llmft.methods.modules import merged_deltas
from llmft.models import all_logits, is_sharded, make_batch, shard_of
from llmft.prompting import SHOTS
from llmft.runtime import Runtime
from llmft.seeds import derive, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS_SCALES = (2.0**10, 2.0**5, 1.0)
"""What a loss is multiplied by in fp16, lest small gradients vanish: the first under which no gradient is too large."""


def diagonal_fisher(
    evaluator: Evaluator, parameters: Sequence[torch.nn.Parameter], n_samples: int, seed: int
) -> tuple[list[torch.Tensor], int]:
    """Estimate the diagonal Fisher information of the network's own next tokens about `parameters`.

        F_i = E_x sum_t E_(y ~ p(. | x_1 .. x_t)) (d log p(y | x_1 .. x_t) / d theta_i)^2,

    x being the queries that are trained on, without their answers, and t every position of one (of a decoder of its own, those up to
    its first token). The tokens y are sampled from the model, as the Fisher information has it; the text's own next tokens would give
    the "empirical" one, which is another quantity (Kunstner et al. 2019). A sample is one query with a token drawn at each of its
    positions, and one backward pass: given the query, the positions' gradients are independent and zero in the mean, so that the square
    of their sum is, in the mean, the sum of their squares.

    Args:
        evaluator: its network is left in evaluation mode, without dropout.
        parameters: of the network, those that are trained.
        n_samples: the queries take turns, in an order drawn once.
        seed: of the order, and of each sample's tokens.

    Returns:
        One tensor per parameter, of this process's shard, on the CPU, scaled so that the mean over all numbers of all
        `parameters` is 1; and the tokens that were read.

    Raises:
        TrialFailure: the information is zero or not finite (DIVERGED), or the time is over (TIMEOUT).
    """
    n_tokens, total = 0, math.nan
    for scale in LOSS_SCALES if evaluator.adapted.model.precision == "fp16" else (1.0,):
        squares, n_read = sum_of_squares(evaluator, parameters, n_samples, seed, scale)
        n_tokens += n_read
        total = _sum_of_all(parameters, squares, evaluator.runtime)
        if math.isfinite(total):
            break
    if not (total > 0 and math.isfinite(total)):
        raise TrialFailure(Cause.DIVERGED, f"the Fisher information of the base model sums to {total}; use the penalty l2_sp.")
    mean = total / sum(parameter.numel() for parameter in parameters)
    return [square.div_(mean).cpu() for square in squares], n_tokens


def _sum_of_all(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor], runtime: Runtime) -> float:
    """Sum numbers that go with the parameters, each once, whichever process holds it."""
    in_all = in_shards = 0.0
    for parameter, value in zip(parameters, values, strict=True):
        part = value.sum(dtype=torch.float64).item()
        if is_sharded(parameter):
            in_shards += part
        else:
            in_all += part
    return in_all + runtime.mean(in_shards) * runtime.world_size


def sum_of_squares(
    evaluator: Evaluator, parameters: Sequence[torch.nn.Parameter], n_samples: int, seed: int, scale: float = 1.0
) -> tuple[list[torch.Tensor], int]:
    """Sum the squared gradients of the samples, on the parameters' devices; returns the sums and the samples' number of tokens.

    Processes that hold the whole network share the samples out; those that hold a part of it work on the same one together.

    Args:
        scale: by which each loss is multiplied, and each gradient divided again.
    """
    adapted, runtime, queries = evaluator.adapted, evaluator.runtime, evaluator.encoded.sets[SHOTS]
    adapted.network.eval()
    order, lengths = stream(seed, "order").permutation(len(queries)).tolist(), evaluator.encoded.lengths(SHOTS)
    samples = [order[number % len(order)] for number in range(n_samples)]
    together = any(map(is_sharded, parameters))
    squares = [torch.zeros_like(shard_of(parameter)) for parameter in parameters]
    for first in range(0, n_samples, 1 if together else runtime.world_size):
        runtime.check_time()
        number = first if together else first + runtime.rank
        if number >= n_samples:
            continue
        batch = make_batch(queries, [samples[number]], None, adapted.model, prefix_ids=evaluator.encoded.prefix_of(SHOTS))
        logits = adapted(all_logits, batch)[0].float()  # [positions, vocabulary]
        draws = torch.Generator(logits.device).manual_seed(derive(seed, f"words/{number}"))
        tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=draws)[:, 0]
        (scale * F.cross_entropy(logits, tokens, reduction="sum")).backward()
        for parameter, square in zip(parameters, squares, strict=True):
            if parameter.grad is not None:
                gradient = shard_of(parameter.grad)
                square.addcmul_(gradient, gradient, value=scale**-2)
        adapted.network.zero_grad(set_to_none=True)
    if not together and runtime.world_size > 1:
        squares = [runtime.all_reduce(square, "sum") for square in squares]
    return squares, sum(lengths[position] for position in samples)


class WeightAnchor:
    """The trained weights of the base as they were at the start, of this process's shards, in the host's memory: no device holds them
    twice.

    Attributes:
        importance: what each of these weights counts in the penalty, as large as the copy; None: all count alike.
    """

    def __init__(self, network: PreTrainedModel, base_names: Collection[str], runtime: Runtime):
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
        """Compute how far the base's weights have moved, as a Euclidean distance; every process must call this.

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
        in_all += sum(_square(away) for away in merged_deltas(self.network))
        return math.sqrt(in_all + self.runtime.mean(in_shards) * self.runtime.world_size)

    def estimate_fisher(self, evaluator: Evaluator, n_samples: int, seed: int) -> int:
        """Let each weight count in the penalty by its Fisher information; returns the tokens that were read for it.

        Args and raises as `diagonal_fisher`, whose `parameters` are those that are anchored.
        """
        self.importance, n_tokens = diagonal_fisher(evaluator, [parameter for parameter, _ in self.pairs], n_samples, seed)
        return n_tokens

    def add_penalty_gradient(self, strength: float) -> None:
        """Add the gradient of strength / 2 times the squared distance (L2-SP, Li et al. 2018; weighed by the `importance`, EWC) to the
        gradients that there are.

        Weights without a gradient were not moved by the optimizer either, and stand where they started.
        """
        for i, (parameter, start) in enumerate(self.pairs):
            if parameter.grad is not None:
                away = shard_of(parameter) - start.to(parameter.device)
                if self.importance is not None:
                    away.mul_(self.importance[i].to(parameter.device))
                shard_of(parameter.grad).add_(away, alpha=strength)


def _square(away: torch.Tensor) -> float:
    return away.float().square_().sum(dtype=torch.float64).item()
