"""Linear probe (Alain & Bengio 2017): a new classification head on the right-most real token of a frozen model.

The head is that of vanilla fine-tuning, linear unless `head: fully_connected`; what it cannot read off the last layer stays
unlearned, so the probe says how much the model knew before.
"""

from typing import Literal

from pydantic import Field

from llmft.config import StrictModel
from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel
from llmft.methods.vanilla import Vanilla


class HeadOnly(Vanilla):
    class Settings(StrictModel):
        head: Literal["fully_connected", "linear"] = Field("linear", description="one layer, or two with a ReLU between")

    train_defaults = {"learning_rate": 1e-3}
    search = {"learning_rate": SearchRange(1e-4, 1e-1, log=True)}
    paper = "Alain & Bengio 2017"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        super().prepare(model, n_labels, generator)
        model.network.requires_grad_(False)
        model.network.classifier.requires_grad_(True)


METHOD = HeadOnly
