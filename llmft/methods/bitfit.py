"""BitFit (Ben Zaken et al. 2022): the biases are trained, those of the layer norms included, and nothing else.

`subset: query_mlp` trains the two kinds that the paper found to matter most: of the query projection (b_q) and of the first layer of
the feed-forward part (b_m2). The language-model head says the label word; embeddings stay frozen, unlike in the code of Mosbach
et al. 2023. Models that have few biases, as Llama's family, are refused.
"""

from typing import Any, Literal

from pydantic import Field

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel, Parameter, PreTrainedModel
from llmft.methods.pattern import PatternBased, PatternSettings

MIN_SHARE = 0.25
"""Of the blocks' weight matrices: how many must have a bias. GPT-J has one at 2 of 6; Llama at none."""


class BitFitSettings(PatternSettings):
    subset: Literal["all", "query_mlp"] = Field(
        "all", description="every bias, or those of the query projection and of the first feed-forward layer"
    )


class BitFit(PatternBased):
    Settings = BitFitSettings
    train_defaults = {"learning_rate": 4e-4}
    search = {"learning_rate": SearchRange(1e-4, 1e-2, log=True)}
    paper = "Ben Zaken et al. 2022"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        network = model.network
        network.requires_grad_(False)
        for bias in self._query_mlp(network) if self.settings.subset == "query_mlp" else self._all(network):
            bias.requires_grad_(True)

    def _all(self, network: PreTrainedModel) -> list[Parameter]:
        from llmft.models import find_blocks

        matrices = [
            module
            for block in find_blocks(network)
            for module in block.modules()
            if getattr(module, "weight", None) is not None and module.weight.ndim == 2
        ]
        n_biases = sum(getattr(module, "bias", None) is not None for module in matrices)
        if n_biases < MIN_SHARE * len(matrices) or not n_biases:
            raise self._too_few(network, f"{n_biases} of the {len(matrices)} weight matrices in its blocks have a bias")
        return [parameter for name, parameter in network.named_parameters() if name.split(".")[-1] == "bias"]

    def _query_mlp(self, network: PreTrainedModel) -> list[Parameter]:
        from llmft.models import find_sublayers, names_in

        names = names_in(network, "bitfit")
        if names.key in (reads for reads, _ in names.attention):
            raise UserError(
                f"method 'bitfit': {network.config.model_type!r} models have no query projection of their own. Use subset: all."
            )
        biases: list[Any] = [sublayer.reads.bias for sublayer in find_sublayers(network, "bitfit")]
        if any(bias is None for bias in biases):
            raise self._too_few(network, "its query or feed-forward layers have no bias")
        return biases

    def _too_few(self, network: PreTrainedModel, why: str) -> UserError:
        return UserError(f"method 'bitfit': {network.config.model_type!r} models have too few biases to train: {why}. Use lora or ia3.")


METHOD = BitFit
