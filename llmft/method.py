"""What a method is: settings, a search space and at most four hooks. Each file in `methods/` holds one.

A method file must import without torch (the plan's validation reads it), so the hooks import what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmft.spec import Spec

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from llmft.model import BorrowedModel
    from llmft.scoring import QueryBatch, Scores
    from llmft.task import Example


@dataclass(frozen=True)
class Range:
    """A search range as plain data: continuous between `low` and `high`, or one of `choices`.

    Attributes:
        levels: how many values a grid takes between `low` and `high`; None: as many as the budget allows.
        when: other hyper-parameter -> the value, or the values, that it must have for this one to be searched.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()
    levels: int | None = None
    when: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = {name: tuple(value) if isinstance(value, list | tuple) else (value,) for name, value in self.when.items()}
        object.__setattr__(self, "when", values)


class Method:
    """A way of adapting a model. Subclasses override what they need; the defaults are plain zero-shot scoring.

    Class attributes:
        Settings: the method's own hyper-parameters, each with its default.
        train_defaults: fields of `TrainSpec` whose default this method changes.
        search: what a sweep searches, by the name of a setting or of a `TrainSpec` field.
        trains: whether weights are changed at all.
        uses_shots: whether labelled examples are used at all.
        base_weights: how the base model's linear layers are held: "fp32", or in 4 bits, "nf4".
        has_own_head: whether a new head answers in place of the language model's, so that there are no words.
        paper: where the method comes from.

    Attributes:
        n_virtual_tokens: places that the method takes in front of every prompt.
    """

    class Settings(Spec):
        pass

    train_defaults: ClassVar[dict[str, Any]] = {}
    search: ClassVar[dict[str, Range]] = {}
    trains: ClassVar[bool] = True
    uses_shots: ClassVar[bool] = True
    base_weights: ClassVar[Literal["fp32", "nf4"]] = "fp32"
    has_own_head: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    n_virtual_tokens: int = 0

    def __init__(self, settings: Spec | None = None):
        self.settings = settings if settings is not None else self.Settings()

    def context(self, shots: tuple[Example, ...]) -> tuple[Example, ...]:
        """The demonstrations that stand in every prompt (none unless the method is in-context learning)."""
        return ()

    def prepare(self, model: BorrowedModel, n_labels: int, generator: torch.Generator) -> None:
        """Change `model.network` in place: add modules, and leave `requires_grad` only where training shall go.

        It is called with every parameter frozen and the network on the CPU, from where it is moved or sharded afterwards; so what
        is added stays on the CPU too, and only `scores` and `loss` run the network. `generator` seeds whatever is initialised.
        """

    def scores(self, model: BorrowedModel, batch: QueryBatch) -> Scores:
        """Score every label for every query of the batch."""
        from llmft.scoring import label_word_scores

        return label_word_scores(model, batch)

    def loss(self, model: BorrowedModel, batch: QueryBatch) -> torch.Tensor:
        """The mean training loss over the batch (a scalar); by default the cross-entropy of `scores`."""
        import torch.nn.functional as F

        return F.cross_entropy(self.scores(model, batch).labels.float(), batch.labels)

    def peft_config(self, network: torch.nn.Module) -> PeftConfig | None:
        """The method in peft's words, for `llmft.export`; None where peft has none for it, or where nothing is added to `network`.

        In the model that peft makes of it, what is trained must have the names that it has here, behind "base_model.model.".
        """
        return None
