"""What a method is: settings, a search space and a few hooks. Each file in `methods/` holds one.

A method file must import without torch (the plan's validation reads it), so the hooks import what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmft.config import StrictModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import torch
    from peft import PeftConfig

    from llmft.config import TrialSpec
    from llmft.data import Draw, Example, Kind
    from llmft.models import AdaptedModel, LoadedModel, QueryBatch, Scores
    from llmft.prompting import LabelWords
    from llmft.records import VirtualToken


@dataclass(frozen=True)
class SearchRange:
    """A search range as plain data: one of `choices`; without choices, a number from `low` to `high`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class TeacherPrompt:
    """What a teacher reads before the training: some of the training inputs, each behind the same opening.

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
        kinds: the kinds of task that it serves; without a language-model head, no text can be generated.
        base_weights: how the base model's linear layers are held: "fp32", or in 4 bits, "nf4".
        has_own_head: whether a new head answers in place of the language model's, so that there are no words.
        paper: where the method comes from.

    Attributes:
        n_virtual_tokens: places that `prepend_prompt` takes in front of every prompt.
        n_mixed: how many examples of other tasks, the spec's `mixture`, are trained on; where there are any, shots may be none.
        marker: text between a rationale and its label word; where there is one, demonstrations show their rationales, and the model
            says one of its own, of up to `n_rationale_tokens`, before its label is read (`llmft.prompting.decoding`).
        trains_bare: whether the prompts of the training leave the demonstrations out.
        n_rounds: how often the lessons are read, and what they gave is trained on: after the first time, which is the untouched model's
            (or the spec's `teacher`'s), by the model as it was trained until then.
        pull_to_start: alpha; training adds alpha / 2 times the squared distance of the weights from their start to the loss.
        n_fisher_samples: in that distance each weight counts by its Fisher information, which is estimated from so many samples of the
            network's own next words (`llmft.training.weight_anchor`); 0: all count alike.
        keeps_unfinished: whether a teacher's text that was cut at the most tokens allowed is trained on.
        calibration_texts: texts without content; where there are any, the label words' probabilities are divided by those that they
            have, on average, after a query of which each field is such a text (`llmft.evaluation.predictions.Predictions.calibrated`).
    """

    class Settings(StrictModel):
        pass

    train_defaults: ClassVar[dict[str, Any]] = {}
    search: ClassVar[dict[str, SearchRange]] = {}
    trains: ClassVar[bool] = True
    uses_shots: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "generation")
    base_weights: ClassVar[Literal["fp32", "nf4"]] = "fp32"
    has_own_head: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    n_virtual_tokens: int = 0
    n_mixed: int = 0
    marker: str = ""
    n_rationale_tokens: int = 0
    trains_bare: bool = False
    n_rounds: int = 1
    pull_to_start: float = 0.0
    n_fisher_samples: int = 0
    keeps_unfinished: bool = False
    calibration_texts: tuple[str, ...] = ()

    def __init__(self, settings: StrictModel | None = None):
        self.settings = settings if settings is not None else self.Settings()
        self.taught: dict[str, torch.Tensor] = {}
        self.responses: dict[str, str] = {}

    def read(self, spec: TrialSpec, tokenizer: Any, words: LabelWords | None) -> None:
        """Take from the trial what the settings speak of, and refuse what does not go together; no weight is loaded yet. `words` is
        None where text is generated.

        Raises:
            UserError: settings that this trial cannot have.
        """

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

    def rates(self, sizes: Mapping[str, int]) -> Mapping[str, float]:
        """How much of a mixture each of its tasks is, by the sizes of their training pools; in their order, one in sum."""
        raise NotImplementedError(f"{type(self).__name__} mixes tasks, and must say how much of each")

    def lessons(self, draw: Draw, generator: np.random.Generator) -> tuple[TeacherPrompt, ...]:
        """What the untouched model (or the spec's `teacher`) is asked about the inputs before the training; mostly nothing.

        Its answers are in `taught` when `prepare` is called. Where text is generated there is one lesson, and the answers are texts: in
        `responses` by the ids of the inputs, and trained on as their references. The first lesson also reads the dev examples, which tells how good a
        teacher it is. `generator` is for what is random about them.
        """
        return ()

    def targets(self, model: LoadedModel, batch: QueryBatch) -> dict[str, torch.Tensor]:
        """What shall be kept of a lesson: tensors of [queries, ...]. They come back in `taught`, on the CPU, a row for each input
        (`QueryBatch.indices` are the rows of a batch)."""
        raise NotImplementedError(f"{type(self).__name__} has lessons, and must say what to keep of them")

    def n_trusted(self) -> int:
        """How many of the inputs are trained towards what is `taught` about them; asked whenever lessons were read.

        Raises:
            UserError: none is.
        """
        return len(next(iter(self.taught.values())))

    def prepare(self, model: LoadedModel, n_labels: int, generator: torch.Generator) -> None:
        """Change `model.network` in place: add modules, and leave `requires_grad` only where training shall go.

        It is called with every parameter frozen and the network on the CPU, from where it is moved or sharded afterwards; so what
        is added stays on the CPU too, and only `scores`, `loss` and `generate` run the network. `generator` seeds whatever is
        initialised. `n_labels` is 0 where text is generated.
        """

    def begin(self, adapted: AdaptedModel, batches: Iterable[QueryBatch]) -> None:
        """Compute what stays the same during training, by calls of `adapted`.

        It is called once, before the first step, in evaluation mode and without gradients; every process gets all shots.
        """

    def prepend_prompt(self, model: LoadedModel, batch: QueryBatch) -> QueryBatch:
        """Put what the method has learned in front of every row (`with_soft_prompt`, `with_prefix`), for `scores` and `loss`."""
        return batch

    def scores(self, model: LoadedModel, batch: QueryBatch) -> Scores:
        """Score every label for every query of the batch."""
        from llmft.models import label_word_scores

        return label_word_scores(model, batch)

    def loss(self, model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
        """The mean training loss over the batch (a scalar).

        By default the cross-entropy of `scores`, or the completions' where the batch has some.
        """
        import torch.nn.functional as F

        if batch.completions is not None:
            from llmft.models import completion_loss

            return completion_loss(model, batch)
        return F.cross_entropy(self.scores(model, batch).labels.float(), batch.labels)

    def fold(self, adapted: AdaptedModel) -> None:
        """After training, replace what only training needed by what it computes; what is kept of a trial is what is left."""

    def peft_adapter(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, torch.Tensor]] | None:
        """After `fold`, what was trained as peft reads it (its configuration and its weights), for `llmft.trial.export`.

        None where peft has no such method.
        """
        return None

    def virtual_tokens(self, model: LoadedModel, tokenizer: Any) -> list[VirtualToken]:
        """For each virtual token, what it resembles; called through `Adapted`."""
        return []
