"""Regularised fine-tuning: pattern-based fine-tuning that is held near the model it starts from.

`penalty: l2_sp` (Li et al. 2018) adds strength / 2 times the squared L2 distance of all weights from their start to the loss;
its gradient is added step by step, so that no device holds the start. `penalty: kl_to_base` adds strength times
KL(p_base || p), in nats and averaged over the queries, between the base model's and the trained model's next word after the
query (the first token of a label word); the base is asked once about every shot. The reported training loss of `l2_sp` is the
task's alone. A strength of 0 is pattern-based fine-tuning.
"""

from typing import Literal

from pydantic import Field

from llmft.method import Range
from llmft.methods.pattern import WholeModel, WholeModelSettings, label_word_loss


class RegularisedSettings(WholeModelSettings):
    penalty: Literal["l2_sp", "kl_to_base"] = "l2_sp"
    strength: float = Field(0.1, ge=0)


class Regularised(WholeModel):
    kinds = ("classification",)
    Settings = RegularisedSettings
    search = {"learning_rate": Range(1e-6, 1e-4, log=True), "strength": Range(1e-3, 10.0, log=True)}
    paper = "Li et al. 2018"

    @property
    def pull_to_start(self):
        return self.settings.strength if self.settings.penalty == "l2_sp" else 0.0

    def next_word(self, model, batch):
        from llmft.scoring import next_word_log_probabilities

        return next_word_log_probabilities(model, batch)

    def begin(self, adapted, batches):
        import torch

        if self.settings.penalty == "kl_to_base":
            found = [(batch.indices.cpu(), adapted("next_word", batch).cpu()) for batch in batches]
            indices, rows = (torch.cat(part) for part in zip(*found, strict=True))
            self.base = torch.empty_like(rows)  # [shots, vocabulary], on the host
            self.base[indices] = rows

    def loss(self, model, batch):
        if self.settings.penalty == "l2_sp":
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
