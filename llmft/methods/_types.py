"""The types of the hooks' arguments and results, for annotations: a method file must import without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Generator, Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

    from llmft.models import AdaptedModel, LoadedModel, QueryBatch, Scores
    from llmft.records import VirtualToken
else:
    AdaptedModel = Generator = LoadedModel = Parameter = PeftConfig = PreTrainedModel = QueryBatch = Scores = Tensor = VirtualToken = Any

__all__ = [
    "AdaptedModel", "Generator", "LoadedModel", "Parameter", "PeftConfig", "PreTrainedModel", "QueryBatch", "Scores", "Tensor",
    "VirtualToken",
]  # fmt: skip
