"""Regularised fine-tuning: pattern-based fine-tuning that is held near the model it starts from.

`penalty: l2_sp` (Li et al. 2018) adds strength / 2 times the squared L2 distance of all weights from their start to the loss;
its gradient is added step by step, so that no device holds the start.

`penalty: ewc` (elastic weight consolidation, Kirkpatrick et al. 2017) weighs each weight in that distance by how much the old
task depends on it: strength / 2 sum_i F_i (theta_i - start_i)^2. The old task of a language model is language modelling, whose
data are not at hand. So F is the diagonal of the Fisher information of the base model's own next tokens at every position of the
queries that are trained on; no label is read. It is estimated before the training, from `n_fisher_samples` queries in turn, with
tokens sampled from the model (`llmft.training.weight_anchor`), and scaled to a mean of 1 over all weights: so a strength means
for the average weight what it means in l2_sp, whatever the model's size and the queries' length. (Kirkpatrick's lambda is the
strength over the mean before the scaling.)

`penalty: kl_to_base` adds strength times KL(p_base || p), in nats and averaged over the queries, between the base model's and the
trained model's next token after the query (the first token of a label word); the base reads every shot once, before the training.

The reported training loss of `l2_sp` and `ewc` is the task's alone. A strength of 0 is pattern-based fine-tuning.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._recipe import AnchorPenalty, Distillation, Recipe, TeacherPrompt, TrialContext
from llmft.methods._types import LoadedModel, QueryBatch, Tensor
from llmft.methods.pattern import WholeModel, WholeModelSettings, label_word_loss


class RegularisedSettings(WholeModelSettings):
    penalty: Literal["l2_sp", "ewc", "kl_to_base"] = Field(
        "l2_sp", description="what holds the model: distance of the weights, by their importance, or KL of the next word"
    )
    strength: float = Field(0.1, ge=0, description="weight of the penalty")
    n_fisher_samples: int = Field(128, ge=1, description="of ewc: passes forward and backward, before the training")


class Regularised(WholeModel):
    kinds = ("classification",)
    Settings = RegularisedSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-4, log=True), "strength": SearchRange(1e-3, 10.0, log=True)}
    paper = "Li et al. 2018; Kirkpatrick et al. 2017"

    def recipe(self, trial: TrialContext) -> Recipe:
        settings, recipe = self.settings, super().recipe(trial)
        if settings.penalty == "kl_to_base":
            prompt = TeacherPrompt(tuple(range(len(recipe.trained_shots))))
            return replace(recipe, teacher=Distillation((prompt,), self.targets, teacher_is_model=True))
        n_samples = settings.n_fisher_samples if settings.penalty == "ewc" and settings.strength else 0
        return replace(recipe, anchor=AnchorPenalty(settings.strength, n_samples))

    def targets(self, model: LoadedModel, batch: QueryBatch) -> dict[str, Tensor]:
        """Compute the log-probabilities of the next token after each query, [queries, vocabulary]."""
        from llmft.models import next_token_log_probabilities

        return {"next_token": next_token_log_probabilities(model, batch)}

    def loss(self, model: LoadedModel, batch: QueryBatch) -> Tensor:
        if self.settings.penalty != "kl_to_base":
            return super().loss(model, batch)
        import torch
        import torch.nn.functional as F

        assert batch.label_words is not None and batch.labels is not None
        ours = self.targets(model, batch)["next_token"]  # [queries, vocabulary]
        base = self.teacher_targets["next_token"][batch.indices.cpu()].to(ours.device)
        if batch.label_words.single:
            scores = ours[:, torch.tensor([word[0] for word in batch.label_words.ids], device=ours.device)]
        else:
            scores = self.scores(model, batch).labels
        divergence = F.kl_div(ours, base, reduction="batchmean", log_target=True)
        return label_word_loss(self.settings.loss, scores, batch.labels) + self.settings.strength * divergence


METHOD = Regularised
