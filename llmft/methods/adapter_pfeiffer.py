"""Lean adapters (Pfeiffer et al. 2021): y + W_up relu(W_down y) after the feed-forward part of every block, and nothing else trained.

`reduction` is the model's width over the adapter's. W_up begins at 0, so the network begins exactly as it was. The paper's blocks
normalise after the residual and its adapter stands behind that; in blocks that normalise first, as those of causal models do, it
reads what the feed-forward part writes, before the residual is added.
"""

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.pattern import PatternBased, PatternSettings


class PfeifferSettings(PatternSettings):
    reduction: int = Field(16, ge=1, description="the model's width over the adapter's")


class Pfeiffer(PatternBased):
    Settings = PfeifferSettings
    train_defaults = {"learning_rate": 1e-4}
    search = {"learning_rate": SearchRange(3e-5, 1e-2, log=True)}
    paper = "Pfeiffer et al. 2021"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from llmft.methods.modules.bottleneck import insert

        size = max(1, model.network.config.hidden_size // self.settings.reduction)
        insert(model.network, "adapter_pfeiffer", ("feed_forward",), size, generator)


METHOD = Pfeiffer
