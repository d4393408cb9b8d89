"""Fine-tuning of the last blocks alone (Lee et al. 2019): the last `n_layers` transformer blocks and the final norm are trained.

Everything below keeps its weights, embeddings and language-model head too; the head says the label word as in pattern-based
fine-tuning. Of an encoder-decoder model the last blocks are the decoder's.
"""

from pydantic import Field

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.pattern import PatternBased, PatternSettings


class LastLayersSettings(PatternSettings):
    n_layers: int = Field(2, ge=1, description="how many blocks are trained")


class LastLayers(PatternBased):
    Settings = LastLayersSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-3, log=True)}
    paper = "Lee et al. 2019"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from llmft.models import find_blocks, is_norm

        network, n = model.network, self.settings.n_layers
        blocks = find_blocks(network)
        if n > len(blocks):
            raise UserError(f"method 'last_layers': settings.n_layers is {n}, and this model has {len(blocks)} blocks. Use fewer.")
        network.requires_grad_(False)
        inside = {module for block in blocks for module in block.modules()}
        norms = [module for name, module in network.named_modules() if is_norm(module) and module not in inside and "embed" not in name]
        for module in (*blocks[-n:], *norms[-1:]):  # the last, for an encoder may have one too; some models have none
            module.requires_grad_(True)


METHOD = LastLayers
