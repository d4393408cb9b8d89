"""A model and the method that adapts it, as one module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple

import torch

from llmft.models.batches import QueryBatch
from llmft.models.loading import LoadedModel

if TYPE_CHECKING:
    from llmft.models.scoring import Scores

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class AdaptingMethod(Protocol):
    """What an adapted model, and whoever evaluates or trains it, needs of a method (`llmft.methods.Method`)."""

    trains: bool
    has_own_head: bool

    def prepend_prompt(self, model: LoadedModel, batch: QueryBatch) -> QueryBatch: ...
    def scores(self, model: LoadedModel, batch: QueryBatch) -> Scores: ...
    def loss(self, model: LoadedModel, batch: QueryBatch) -> torch.Tensor: ...


class AdaptedModel(torch.nn.Module):
    """The one module that training and evaluation call; whatever they compute with the network is computed inside of its `forward`.

    That matters where a strategy wraps it: FSDP gathers the weights only while the module that it sharded is running, and DDP
    looks for gradients only after a call of its own.
    """

    def __init__(self, method: AdaptingMethod, model: LoadedModel):
        super().__init__()
        self.network, self.method, self.model = model.network, method, model

    def forward(self, compute: Callable[[LoadedModel, *Arguments], Result], *arguments: *Arguments) -> Result:
        """Return `compute(model, *arguments)`, in the model's precision and with the method's learned prompt in front of every batch.

        Args:
            compute: such as a method's `loss` or `scores`, or a function of `llmft.models` (`generate`, `all_logits`).
        """
        with self.model.autocast():
            prepended: Any = [self.method.prepend_prompt(self.model, a) if isinstance(a, QueryBatch) else a for a in arguments]
            return compute(self.model, *prepended)

    if TYPE_CHECKING:  # torch types the result of every module as Any

        def __call__(self, compute: Callable[[LoadedModel, *Arguments], Result], *arguments: *Arguments) -> Result: ...

    @property
    def n_virtual_tokens(self) -> int:
        """Positions that the method's learned prompt takes in front of every text."""
        one = torch.ones(1, 1, dtype=torch.int64, device=self.model.device)
        text = QueryBatch(one, one, one[0], None, one[0], None)  # of one token
        with torch.no_grad():
            return self(lambda model: self.method.prepend_prompt(model, text).attention_mask.shape[1] - 1)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients stay in this process, as DDP's `no_sync`; alone there is nothing to do.

        Nor under FSDP, where gradients that wait to be exchanged would be whole ones, as large as the model, on every device.
        """
        return nullcontext()

    def reshard(self) -> None:
        """Drop gathered weights, which a change of the shards has made stale, as FSDP's `reshard`; without FSDP there is nothing to do."""
