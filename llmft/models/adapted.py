"""A model and the method that adapts it, as one module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmft.models.batches import QueryBatch
from llmft.models.loading import LoadedModel
from llmft.models.prefix_attention import encode_shared
from llmft.models.scoring import all_logits


class AdaptedModel(torch.nn.Module):
    """The one module that training, evaluation and the shared prefix call; the methods call the network inside.

    That matters where a strategy wraps it: FSDP gathers the weights only while the module that it sharded is running, and DDP
    looks for gradients only after a call of its own.
    """

    def __init__(self, method: Any, model: LoadedModel):
        super().__init__()
        self.network, self.method, self.model = model.network, method, model

    def forward(self, what: str, given: Any = None, *more: Any) -> Any:
        """The method's `loss`, `scores` or `targets` of a batch (or what else it computes, as what it does `generate` by a `Decoding`),
        its `logits` of all words at all places, or the encoded `prefix` of token ids."""
        with self.model.autocast():
            if what == "prefix":
                return encode_shared(self.model, given)
            if isinstance(given, QueryBatch):
                given = self.method.condition(self.model, given)
            if what == "logits":
                return all_logits(self.model, given)
            return getattr(self.method, what)(self.model, given, *more)

    def no_sync(self) -> AbstractContextManager:
        """As DDP's: a context in which gradients stay in this process. Nothing to do alone.

        Nor under FSDP, where gradients that wait to be exchanged would be whole ones, as large as the model, on every device.
        """
        return nullcontext()

    def reshard(self) -> None:
        """As FSDP's: drop gathered weights, which a change of the shards has made stale. Nothing to do without FSDP."""
