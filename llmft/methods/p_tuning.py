"""P-tuning (Liu et al. 2021): the embeddings in front of every prompt come out of a small network, which is trained with them.

The encoder is peft's: `mlp`, three linear layers with ReLU between, or `lstm`, a bidirectional LSTM of two layers and two linear
layers. It ties the virtual tokens together, and learns at lower rates than embeddings alone. What is kept is what it computes:
after training the embeddings take its place. The prompt differs from no prompt at the start: there is no identity to begin with.
"""

from typing import Literal

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.prompt_tuning import SoftPromptMethod, SoftPromptSettings


class PTuningSettings(SoftPromptSettings):
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="the network that computes the embeddings")
    encoder_width: int | None = Field(None, ge=1, description="null: that of the embeddings")


class PTuning(SoftPromptMethod):
    Settings = PTuningSettings
    train_defaults = {"learning_rate": 1e-3}
    search = {"learning_rate": SearchRange(1e-5, 1e-1, log=True)}
    paper = "Liu et al. 2021"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from peft import PromptEncoder, PromptEncoderConfig

        from llmft.methods.modules.soft_prompt import EncodedPrompt, train_only

        settings, width = self.settings, model.network.get_input_embeddings().weight.shape[1]
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.n_virtual_tokens, num_transformer_submodules=1, token_dim=width,
            encoder_reparameterization_type=settings.encoder.upper(), encoder_hidden_size=settings.encoder_width or width,
        )  # fmt: skip
        prompt = EncodedPrompt.seeded(lambda: PromptEncoder(config), settings.n_virtual_tokens, generator)
        train_only(model, prompt)


METHOD = PTuning
