"""Prompt tuning (Lester et al. 2021): k trained embeddings stand in front of every prompt, and every weight is frozen.

The answer is read off the language-model head as in pattern-based fine-tuning. The embeddings begin as words sampled from the
5,000 first of the vocabulary (`initialisation: vocabulary`; subword vocabularies list frequent words first), as numbers from
U(-0.5, 0.5) (`random`), as the embeddings of a `text`, repeated or cut to k tokens, or as the `labels`: one token a label word,
the mean of its tokens, the rest sampled as above. The prompt differs from no prompt at the start: there is no identity to begin
with. The learning rate must be high, 0.3 with Adafactor in the paper. A prompt is worth little without the model that it was
learned on, but is small: another task is another file.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._recipe import Prompting, Recipe, TrialContext
from llmft.methods._types import AdaptedModel, Generator, LoadedModel, PeftConfig, QueryBatch, Tensor, VirtualToken
from llmft.methods.pattern import PatternBased, PatternSettings


class SoftPromptSettings(PatternSettings):
    n_virtual_tokens: int = Field(20, ge=1, description="length of what is learned")


class PromptSettings(SoftPromptSettings):
    initialisation: Literal["vocabulary", "random", "text", "labels"] = Field("vocabulary", description="where the embeddings begin")
    text: str = Field("", description="for initialisation: text")

    @model_validator(mode="after")
    def _text_is_there(self):
        if self.initialisation == "text" and not self.text.strip():
            raise ValueError("initialisation 'text' needs words: set text, e.g. text: 'Does the first sentence imply the second?'")
        return self


class SoftPromptMethod(PatternBased):
    """What the methods that learn embeddings in front of the prompt share; `network.soft_prompt()` gives them."""

    Settings = SoftPromptSettings
    tokenizer: Any = None  # of the trial; None for a model that was trained before

    def recipe(self, trial: TrialContext) -> Recipe:
        self.tokenizer = trial.tokenizer
        return replace(super().recipe(trial), prompting=Prompting(n_virtual_tokens=self.settings.n_virtual_tokens))

    @property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.all_special_ids) if self.tokenizer else ()

    def soft_prompt(self, model: LoadedModel) -> Tensor:
        """Compute the learned vectors, [virtual tokens, width]."""
        return model.network.soft_prompt()

    def prepend_prompt(self, model: LoadedModel, batch: QueryBatch) -> QueryBatch:
        from llmft.models import with_soft_prompt

        return with_soft_prompt(batch, self.soft_prompt(model))

    def finalize(self, adapted: AdaptedModel) -> list[VirtualToken]:
        import torch

        from llmft.methods.modules.soft_prompt import SoftPrompt

        with torch.no_grad():
            adapted.network.soft_prompt = SoftPrompt(adapted(self.soft_prompt).clone())
        return adapted(self.nearest_tokens) if self.tokenizer else []

    def nearest_tokens(self, model: LoadedModel) -> list[VirtualToken]:
        """Find the tokens of the vocabulary that each virtual token is nearest to."""
        from llmft.methods.modules.soft_prompt import nearest_tokens

        return nearest_tokens(self.soft_prompt(model), model.network.get_input_embeddings().weight, self.tokenizer)

    def export(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        from peft import PromptTuningConfig

        from llmft.methods.modules.peft_layers import task_type

        vectors = self.soft_prompt(model).detach()
        config = PromptTuningConfig(
            task_type=task_type(model.network), num_virtual_tokens=len(vectors), token_dim=vectors.shape[1],
            num_transformer_submodules=1,  # an encoder's prompt alone
        )  # fmt: skip
        return config, {"prompt_embeddings": vectors}


class PromptTuning(SoftPromptMethod):
    Settings = PromptSettings
    train_defaults = {"learning_rate": 0.03}
    search = {"learning_rate": SearchRange(1e-3, 1.0, log=True)}
    paper = "Lester et al. 2021"

    tokens_to_copy: tuple[tuple[int, ...], ...] = ()

    def recipe(self, trial: TrialContext) -> Recipe:
        if self.settings.initialisation == "labels":
            if trial.label_words is None:
                raise UserError(
                    f"initialisation: 'labels' are label words, and the task '{trial.spec.task}' generates text. Use vocabulary or text."
                )
            self.tokens_to_copy = trial.label_words.ids
        elif self.settings.initialisation == "text":
            ids = trial.tokenizer(self.settings.text, add_special_tokens=False)["input_ids"]
            self.tokens_to_copy = tuple((ids[i % len(ids)],) for i in range(self.settings.n_virtual_tokens))
        return super().recipe(trial)

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        import torch

        from llmft.methods.modules.soft_prompt import SoftPrompt, sample_tokens, train_only

        words, k = model.network.get_input_embeddings().weight.detach(), self.settings.n_virtual_tokens
        if self.settings.initialisation == "random":
            vectors = torch.rand(k, words.shape[1], generator=generator) - 0.5
        else:
            vectors = words[sample_tokens(len(words), self.special_ids, k, generator).to(words.device)].clone()
            for position, ids in enumerate(self.tokens_to_copy[:k]):
                vectors[position] = words[list(ids)].mean(0)
        train_only(model, SoftPrompt(vectors))


METHOD = PromptTuning
