"""What a method is: settings, a search space and seven hooks. Each file in `methods/` holds one.

A method file must import without torch (the plan's validation reads it), so the hooks import what they need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmft.config import StrictModel
from llmft.methods._recipe import Recipe, TrialContext
from llmft.methods._types import AdaptedModel, Generator, LoadedModel, PeftConfig, QueryBatch, Scores, Tensor, VirtualToken

if TYPE_CHECKING:
    from llmft.data import Kind


@dataclass(frozen=True)
class SearchRange:
    """A search range as plain data: one of `choices`; without choices, a number from `low` to `high`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()


class NoSettings(StrictModel):
    """Of a method that has nothing to set."""


class Method:
    """A way of adapting a model. Subclasses override what they need; the defaults are plain zero-shot scoring.

    Declarations:
        Settings: the method's own hyper-parameters, each with its default.
        train_defaults: fields of `TrainSpec` whose default this method changes.
        search: what a sweep searches, by the name of a setting or of a `TrainSpec` field.
        trains: whether weights are changed at all.
        uses_shots: whether labelled examples are used at all.
        shows_demonstrations: whether labelled examples stand in the prompts of dev and the test sets.
        uses_teacher: whether the spec's `teacher` may be another model.
        uses_mixture: whether examples of other tasks, the spec's `mixture`, are trained on; then shots may be none.
        kinds: the kinds of task that it serves; without a language-model head, no text can be generated.
        base_weights: how the base model's linear layers are held: "fp32", or in 4 bits, "nf4".
        has_own_head: whether a new head answers in place of the language model's, so that there are no label words.
        paper: where the method comes from.

    Attributes:
        teacher_targets: what a teacher has said about the training examples (`Distillation.targets`), when `prepare` is called.
    """

    Settings: ClassVar[type[StrictModel]] = NoSettings
    train_defaults: ClassVar[dict[str, Any]] = {}
    search: ClassVar[dict[str, SearchRange]] = {}
    uses_shots: ClassVar[bool] = True
    shows_demonstrations: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = False
    uses_mixture: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "generation")
    paper: ClassVar[str] = ""
    trains: bool = True
    base_weights: Literal["fp32", "nf4"] = "fp32"
    has_own_head: bool = False

    def __init__(self, settings: StrictModel | None = None):
        self.settings: Any = settings if settings is not None else self.Settings()
        self.teacher_targets: dict[str, Tensor] = {}

    def recipe(self, trial: TrialContext) -> Recipe:
        """Return what the method asks of a trial, and refuse what does not go together; no weight is loaded yet.

        Raises:
            UserError: settings that this trial cannot have.
        """
        return Recipe(trained_shots=trial.draw.shots)

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        """Change `model.network` in place: add modules, and leave `requires_grad` only where training shall go.

        It is called with every parameter frozen and the network on the CPU, from where it is moved or sharded afterwards; so what
        is added stays on the CPU too, and only `scores`, `loss` and `generate` run the network. `generator` seeds whatever is
        initialised. `n_labels` is 0 where text is generated.
        """

    def prepend_prompt(self, model: LoadedModel, batch: QueryBatch) -> QueryBatch:
        """Put the learned prompt in front of every row (`with_soft_prompt`, `with_prefix`), for `scores` and `loss`."""
        return batch

    def scores(self, model: LoadedModel, batch: QueryBatch) -> Scores:
        """Score every label for every query of the batch."""
        from llmft.models import label_word_scores

        return label_word_scores(model, batch)

    def loss(self, model: LoadedModel, batch: QueryBatch) -> Tensor:
        """Compute the mean training loss over the batch (a scalar).

        By default the cross-entropy of `scores`, or the completions' where the batch has some.
        """
        import torch.nn.functional as F

        if batch.completions is not None:
            from llmft.models import completion_loss

            return completion_loss(model, batch)
        assert batch.labels is not None, "what is not labelled has completions"
        return F.cross_entropy(self.scores(model, batch).labels.float(), batch.labels)

    def finalize(self, adapted: AdaptedModel) -> list[VirtualToken]:
        """After training, replace what only training needed by what it computes; what is kept of a trial is what is left.

        Returns:
            What each virtual token resembles; empty where there are none.
        """
        return []

    def export(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        """After `finalize`, return what was trained as peft reads it (its configuration and its weights), for `llmft.trial.export`.

        None where peft has no such method.
        """
        return None
