"""Parallel adapters (He et al. 2022): scale * W_up relu(W_down x) beside the feed-forward part, the attention, or both.

x is what the part reads, behind the layer norm. The paper's best is beside the feed-forward part with a scale of 4. W_up begins at
0, so the network begins exactly as it was.
"""

from typing import Literal

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.pattern import PatternBased, PatternSettings


class ParallelSettings(PatternSettings):
    beside: Literal["feed_forward", "attention", "both"] = Field(
        "feed_forward", description="which part of a block has an adapter beside it"
    )
    reduction: int = Field(2, ge=1, description="the model's width over the adapter's")
    scale: float = Field(4.0, gt=0, description="factor of what an adapter adds")


class Parallel(PatternBased):
    Settings = ParallelSettings
    train_defaults = {"learning_rate": 1e-4}
    search = {"learning_rate": SearchRange(1e-5, 1e-2, log=True)}
    paper = "He et al. 2022"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from llmft.methods.modules.bottleneck import insert

        settings, width = self.settings, model.network.config.hidden_size
        kinds = ("attention", "feed_forward") if settings.beside == "both" else (settings.beside,)
        size = max(1, width // settings.reduction)
        insert(model.network, "adapter_parallel", kinds, size, generator, scale=settings.scale, parallel=True)


METHOD = Parallel
