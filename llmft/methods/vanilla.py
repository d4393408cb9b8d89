"""Vanilla fine-tuning (Devlin et al. 2019): a new classification head on the right-most real token; every weight is trained.

Where an encoder reads the prompt, the head stands on the decoder's first state, from which the label word would be said.

The head is linear, or fully connected as in Mosbach et al. 2023: Linear(d, d), ReLU, dropout, Linear(d, labels), weights from
N(0, 0.02), biases 0.
"""

from typing import Literal

from pydantic import Field

from llmft.config import StrictModel
from llmft.methods._base import Method, SearchRange
from llmft.methods._types import Generator, LoadedModel, QueryBatch, Scores

INIT_STD = 0.02


class Vanilla(Method):
    class Settings(StrictModel):
        head: Literal["fully_connected", "linear"] = Field("fully_connected", description="one layer, or two with a ReLU between")

    kinds = ("classification",)
    has_own_head = True
    search = {"learning_rate": SearchRange(1e-6, 1e-4, log=True)}
    paper = "Devlin et al. 2019"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        import torch
        from torch import nn

        width = model.width
        head: nn.Module
        if self.settings.head == "linear":
            head = nn.Linear(width, n_labels, bias=False)
        else:
            dropout = nn.Dropout(model.dropout)
            head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), dropout, nn.Linear(width, n_labels))
        for parameter in head.parameters():
            with torch.no_grad():
                parameter.zero_() if parameter.ndim == 1 else parameter.normal_(0, INIT_STD, generator=generator)
        model.network.requires_grad_(True)
        output = model.network.get_output_embeddings()
        if output.weight is not model.network.get_input_embeddings().weight:
            output.requires_grad_(False)  # the head replaces it
        model.network.classifier = head

    def scores(self, model: LoadedModel, batch: QueryBatch) -> Scores:
        from llmft.models import Scores, answer_hidden

        return Scores(model.network.classifier(answer_hidden(model, batch)))


METHOD = Vanilla
