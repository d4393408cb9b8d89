"""Regularised fine-tuning: pattern-based fine-tuning that is held near the model it starts from.

`penalty: l2_sp` (Li et al. 2018) adds strength / 2 times the squared L2 distance of all weights from their start to the loss;
its gradient is added step by step, so that no device holds the start.

`penalty: ewc` (elastic weight consolidation, Kirkpatrick et al. 2017) lets each weight count in that distance by how much the old
task hangs on it: strength / 2 sum_i F_i (theta_i - start_i)^2. The old task of a language model is language modelling, whose
data are not at hand. So F is the diagonal of the Fisher information of the base model's own next words at every place of the
queries that are trained on; no label is read. It is estimated before the training, from `n_fisher_samples` queries in turn, with
words drawn from the model (`llmft.training.weight_anchor`), and scaled to a mean of 1 over all weights: so a strength means for the average
weight what it means in l2_sp, whatever the model's size and the queries' length. (Kirkpatrick's lambda is the strength over the
mean before the scaling.)

`penalty: kl_to_base` adds strength times KL(p_base || p), in nats and averaged over the queries, between the base model's and the
trained model's next word after the query (the first token of a label word); the base is asked once about every shot.

The reported training loss of `l2_sp` and `ewc` is the task's alone. A strength of 0 is pattern-based fine-tuning.
"""

from typing import Literal

from pydantic import Field

from llmft.methods._base import SearchRange
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

    @property
    def pull_to_start(self):
        return 0.0 if self.settings.penalty == "kl_to_base" else self.settings.strength

    @property
    def n_fisher_samples(self):
        return self.settings.n_fisher_samples if self.settings.penalty == "ewc" and self.settings.strength else 0

    def next_word(self, model, batch):
        from llmft.models import next_token_log_probabilities

        return next_token_log_probabilities(model, batch)

    def begin(self, adapted, batches):
        import torch

        if self.settings.penalty == "kl_to_base":
            found = [(batch.indices.cpu(), adapted(self.next_word, batch).cpu()) for batch in batches]
            indices, rows = (torch.cat(part) for part in zip(*found, strict=True))
            self.base = torch.empty_like(rows)  # [shots, vocabulary], on the host
            self.base[indices] = rows

    def loss(self, model, batch):
        if self.settings.penalty != "kl_to_base":
            return super().loss(model, batch)
        import torch
        import torch.nn.functional as F

        ours = self.next_word(model, batch)  # [queries, vocabulary]
        base = self.base[batch.indices.cpu()].to(ours.device)
        if batch.words.single:
            scores = ours[:, torch.tensor([word[0] for word in batch.words.ids], device=ours.device)]
        else:
            scores = self.scores(model, batch).labels
        divergence = F.kl_div(ours, base, reduction="batchmean", log_target=True)
        return label_word_loss(self.settings.loss, scores, batch.labels) + self.settings.strength * divergence


METHOD = Regularised
