"""What a method is: settings, a search space and a few hooks. Each file in `methods/` holds one.

A method file must import without torch (the plan's validation reads it), so the hooks import what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from llmft.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmft.model import BorrowedModel
    from llmft.scoring import QueryBatch, Scores
    from llmft.task import Draw, Example


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


@dataclass(frozen=True)
class Lesson:
    """What an untouched model reads before the training: some of the training inputs, each behind the same opening.

    `inputs` are places in what `Method.inputs` gives; an `instruction`, if there is one, stands in front of the demonstrations.
    """

    inputs: tuple[int, ...]
    demonstrations: tuple[Example, ...] = ()
    instruction: str = ""


class Method:
    """A way of adapting a model. Subclasses override what they need; the defaults are plain zero-shot scoring.

    Class attributes:
        Settings: the method's own hyper-parameters, each with its default.
        train_defaults: fields of `TrainSpec` whose default this method changes.
        search: what a sweep searches, by the name of a setting or of a `TrainSpec` field.
        trains: whether weights are changed at all.
        uses_shots: whether labelled examples are used at all.
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
    has_own_head: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    n_virtual_tokens: int = 0

    def __init__(self, settings: Spec | None = None):
        self.settings = settings if settings is not None else self.Settings()
        self.taught: dict[str, torch.Tensor] = {}

    def context(self, shots: tuple[Example, ...]) -> tuple[Example, ...]:
        """The demonstrations that stand in every prompt (none unless the method is in-context learning)."""
        return ()

    @property
    def n_unlabelled(self) -> int:
        """How many examples of the training pool the method reads without their labels."""
        return 0

    def inputs(self, draw: Draw) -> tuple[Example, ...]:
        """What is trained on."""
        return draw.shots

    def lessons(self, draw: Draw, generator: np.random.Generator) -> tuple[Lesson, ...]:
        """What the untouched model (or the spec's `teacher`) is asked about the inputs, once, before the training; mostly nothing.

        Its answers are in `taught` when `prepare` is called. The first lesson also reads the dev examples, which tells how good a
        teacher it is. `generator` is for what is random about them.
        """
        return ()

    def targets(self, model: BorrowedModel, batch: QueryBatch) -> dict[str, torch.Tensor]:
        """What shall be kept of a lesson: tensors of [queries, ...]. They come back in `taught`, on the CPU, a row for each input
        (`QueryBatch.indices` are the rows of a batch)."""
        raise NotImplementedError(f"{type(self).__name__} has lessons, and must say what to keep of them")

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
