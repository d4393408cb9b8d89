"""Bottleneck adapters (Houlsby et al. 2019): y + W_up gelu(W_down y) after the attention and after the feed-forward part of every block.

Each adapter reads what the part's last projection writes, before the residual is added. W_up begins at 0, where the paper has
N(0, 0.001) for both matrices: so the network begins exactly as it was. As in the paper the layer norms are trained as well
(`train_norms: false` leaves them frozen). The language-model head, frozen, says the label word.
"""

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.pattern import PatternBased, PatternSettings


class HoulsbySettings(PatternSettings):
    bottleneck: int = Field(64, ge=1, description="width of an adapter")
    train_norms: bool = Field(True, description="the layer norms are trained as well")


class Houlsby(PatternBased):
    Settings = HoulsbySettings
    train_defaults = {"learning_rate": 3e-4}
    search = {"learning_rate": SearchRange(3e-5, 1e-2, log=True)}
    paper = "Houlsby et al. 2019"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from llmft.methods.modules.bottleneck import insert
        from llmft.models import is_norm

        kinds = ("attention", "feed_forward")
        insert(model.network, "adapter_houlsby", kinds, self.settings.bottleneck, generator, activation="gelu")
        for module in model.network.modules() if self.settings.train_norms else ():
            if is_norm(module):
                module.requires_grad_(True)


METHOD = Houlsby
