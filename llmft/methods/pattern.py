"""Pattern-based fine-tuning (Schick & Schuetze 2021; Gao et al. 2021): every weight is trained to say the right label word.

The language-model head is kept. `loss: full_vocabulary` raises the label word among all words, as Mosbach et al. 2023 do;
`loss: restricted` raises it among the label words only. Where text is generated, the reference's tokens and the end of the text
take the place of the label word, and `loss` makes no difference.

`untie_embeddings: true` makes the head a copy where it is the input embedding, and trains both apart, as an option of the code of
Mosbach et al. 2023 does. It is for models that tie them (OPT, GPT-2, T5), and adds a matrix of the vocabulary to what is trained.
"""

from typing import Literal

from pydantic import Field

from llmft.config import StrictModel
from llmft.methods._base import Method, SearchRange
from llmft.methods._types import Generator, LoadedModel, QueryBatch, Tensor


class PatternSettings(StrictModel):
    loss: Literal["full_vocabulary", "restricted"] = Field(
        "full_vocabulary", description="raises the label word among all words, or among the label words"
    )


class WholeModelSettings(PatternSettings):
    untie_embeddings: bool = Field(False, description="the head is trained apart from the input embedding")


def label_word_loss(kind: str, scores: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of `scores` (`Scores.labels`, [queries, labels]) for gold `labels` [queries], in nats."""
    import torch.nn.functional as F

    return F.cross_entropy(scores, labels) if kind == "restricted" else F.nll_loss(scores, labels)


class PatternBased(Method):
    Settings = PatternSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-4, log=True)}
    paper = "Schick & Schuetze 2021"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        model.network.requires_grad_(True)

    def loss(self, model: LoadedModel, batch: QueryBatch) -> Tensor:
        if batch.completions is not None:
            return super().loss(model, batch)
        assert batch.labels is not None
        return label_word_loss(self.settings.loss, self.scores(model, batch).labels, batch.labels)


class WholeModel(PatternBased):
    Settings = WholeModelSettings

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        super().prepare(model, n_labels, generator)
        if self.settings.untie_embeddings:
            from llmft.methods.modules.untied_embeddings import untie_embeddings

            untie_embeddings(model)


METHOD = WholeModel
