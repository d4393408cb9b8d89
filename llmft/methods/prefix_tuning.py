"""Prefix tuning (Li & Liang 2021): k trained keys and values in every layer, which every token of the prompt attends to.

No weight is changed, and no token goes through the network for them. They begin as the keys and values of k tokens, sampled from
the 5,000 first of the vocabulary (`initialisation: vocabulary`; the paper finds words much better than chance where examples are
few), or near zero, N(0, 0.02) (`random`). `reparametrise` computes them instead, as the paper does where examples are many, from
one embedding per position by a network of two layers with a tanh between (peft's); training needs it, and keys and values take
its place at the end. An attention that has more to look at is another one: there is no identity to begin with. Text begins at
position k.

Gradient checkpointing is refused: transformers drops the cache that holds the prefix where it is on.
"""

from typing import Literal

from pydantic import Field

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._recipe import Recipe, TrialContext
from llmft.methods._types import Generator, LoadedModel, PeftConfig, QueryBatch, Tensor, VirtualToken
from llmft.methods.prompt_tuning import SoftPromptMethod, SoftPromptSettings

INIT_STD = 0.02


class PrefixSettings(SoftPromptSettings):
    initialisation: Literal["vocabulary", "random"] = Field("vocabulary", description="keys and values of words, or near zero")
    reparametrise: bool = Field(False, description="a network computes them in training")
    encoder_width: int = Field(512, ge=1, description="of that network")


class PrefixTuning(SoftPromptMethod):
    Settings = PrefixSettings
    train_defaults = {"learning_rate": 0.03}
    search = {"learning_rate": SearchRange(1e-4, 1.0, log=True)}
    paper = "Li & Liang 2021"

    def recipe(self, trial: TrialContext) -> Recipe:
        from llmft.models import load_config

        if trial.spec.train.gradient_checkpointing:
            raise UserError(
                "train.gradient_checkpointing: 'prefix_tuning' cannot have it, since transformers drops the keys and values that are "
                "learned. Set it to false, or use prompt_tuning."
            )
        if load_config(trial.spec.model).is_encoder_decoder:
            raise UserError(
                "method 'prefix_tuning': learns keys and values for causal models only, and this one has an encoder. Use prompt_tuning."
            )
        return super().recipe(trial)

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        import torch
        from torch import nn

        from llmft.methods.modules.soft_prompt import EncodedPrompt, SoftPrompt, cached_tokens, sample_tokens, train_only

        settings, n_words = self.settings, len(model.network.get_input_embeddings().weight)
        vectors = cached_tokens(model, sample_tokens(n_words, self.special_ids, settings.n_virtual_tokens, generator))
        self.shape = vectors.shape[1:]  # layers, keys and values, heads, size
        vectors = vectors.flatten(1)  # as peft keeps them
        if settings.initialisation == "random":
            vectors = torch.empty(vectors.shape).normal_(0, INIT_STD, generator=generator)
        prompt: nn.Module = SoftPrompt(vectors)
        if settings.reparametrise:
            from peft import PrefixEncoder, PrefixTuningConfig

            n_layers, _, n_heads, size = self.shape
            config = PrefixTuningConfig(
                num_virtual_tokens=settings.n_virtual_tokens, token_dim=n_heads * size, num_layers=n_layers,
                encoder_hidden_size=settings.encoder_width, prefix_projection=True,
            )  # fmt: skip
            prompt = EncodedPrompt.seeded(lambda: PrefixEncoder(config), settings.n_virtual_tokens, generator)
        train_only(model, prompt)

    def prepend_prompt(self, model: LoadedModel, batch: QueryBatch) -> QueryBatch:
        from llmft.models import HALF, Prefix, with_prefix

        vectors = self.soft_prompt(model).to(HALF.get(model.precision))
        layers = vectors.unflatten(1, self.shape).permute(1, 2, 3, 0, 4)  # [layers, 2, heads, virtual tokens, size]
        return with_prefix(batch, Prefix(tuple((keys[None], values[None]) for keys, values in layers), len(vectors)))

    def nearest_tokens(self, model: LoadedModel) -> list[VirtualToken]:
        return []  # keys and values are no embeddings

    def export(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        from peft import PrefixTuningConfig

        n_layers, _, n_heads, size = self.shape
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.settings.n_virtual_tokens, token_dim=n_heads * size, num_layers=n_layers,
            num_attention_heads=n_heads,
        )  # fmt: skip
        return config, {"prompt_embeddings": self.soft_prompt(model).detach()}


METHOD = PrefixTuning
