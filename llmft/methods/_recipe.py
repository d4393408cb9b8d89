"""What a method asks of a trial, as data: prompts, a teacher, other tasks, a penalty on the distance from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmft.config import TrialSpec
    from llmft.data import Draw, Example
    from llmft.models import LoadedModel, QueryBatch
    from llmft.prompting import LabelWords


@dataclass(frozen=True)
class TrialContext:
    """What a recipe may depend on.

    Attributes:
        draw: shots and dev examples; unlabelled ones are drawn once the recipe says how many.
        tokenizer: the model's.
        label_words_behind: gives the trial's label words as they are tokenized behind the prompt and a text, `rationale_marker`; None
            where text is generated.
    """

    spec: TrialSpec
    draw: Draw
    tokenizer: Any = None
    label_words_behind: Callable[[str], LabelWords | None] = lambda text: None
    rationale_marker: str = ""

    @property
    def label_words(self) -> LabelWords | None:
        return self.label_words_behind(self.rationale_marker)


@dataclass(frozen=True)
class Rationales:
    """Rationales between query and label word: the `marker` ends one, and the model generates up to `n_tokens` of its own."""

    marker: str
    n_tokens: int


@dataclass(frozen=True)
class Prompting:
    """What stands in the trial's prompts.

    Attributes:
        demonstrations: examples in the prompt of dev and the test sets.
        train_without_demonstrations: whether the prompts of the training leave them out.
        n_virtual_tokens: positions that `Method.prepend_prompt` takes in front of every prompt.
        rationales: what stands between query and label word (`llmft.prompting.decoding`); None: nothing.
        calibration_texts: texts without content; where there are any, the label words' probabilities are divided by those that they
            have, on average, after a query of which each field is such a text (`llmft.evaluation.predictions.Predictions.calibrated`).
    """

    demonstrations: tuple[Example, ...] = ()
    train_without_demonstrations: bool = False
    n_virtual_tokens: int = 0
    rationales: Rationales | None = None
    calibration_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherPrompt:
    """A teacher prompt: training examples that share one prefix.

    `examples` are positions among the training examples, the unlabelled ones first; an `instruction`, if there is one, stands in front
    of the demonstrations.
    """

    examples: tuple[int, ...]
    demonstrations: tuple[Example, ...] = ()
    instruction: str = ""


def count_targets(targets: Mapping[str, torch.Tensor]) -> int:
    """Count all training examples as learned from."""
    return len(next(iter(targets.values())))


@dataclass(frozen=True)
class Distillation:
    """What the untouched model, or the spec's `teacher`, is asked about the training examples before the training.

    Where text is generated there is one prompt, and the teacher's texts are trained on as references.

    Attributes:
        prompts: each is a pass over some of the training examples.
        targets: computes what is kept of a batch of them: tensors of [queries, ...]. They come back in `Method.teacher_targets`, on
            the CPU, a row for each training example (`QueryBatch.indices` are the rows of a batch). None where text is generated.
        count_selected: counts the training examples whose targets are learned from, and raises a UserError where none is.
        n_unlabelled: examples of the training pool that are trained on as well, without their labels.
        n_rounds: how often targets are computed and trained on: after the first time by the model as it was trained until then.
        keep_truncated_texts: whether a text that was cut at the most tokens allowed is trained on.
        teacher_is_model: whether the untouched model alone can be the teacher, which is then a reference and not scored on dev.
    """

    prompts: tuple[TeacherPrompt, ...]
    targets: Callable[[LoadedModel, QueryBatch], dict[str, torch.Tensor]] | None = None
    count_selected: Callable[[Mapping[str, torch.Tensor]], int] = count_targets
    n_unlabelled: int = 0
    n_rounds: int = 1
    keep_truncated_texts: bool = False
    teacher_is_model: bool = False


@dataclass(frozen=True)
class TaskMixture:
    """Training on `n_examples` of the tasks of the spec's `mixture`.

    `rates` gives each task's share by the sizes of all tasks' training pools; in their order, one in sum.
    """

    n_examples: int
    rates: Callable[[Mapping[str, int]], Mapping[str, float]]


@dataclass(frozen=True)
class AnchorPenalty:
    """A penalty of `strength` / 2 times the squared distance of the weights from their start (L2-SP; `llmft.training.weight_anchor`).

    `n_fisher_samples`: each weight counts by its Fisher information (EWC), estimated from so many samples; 0: all count alike.
    """

    strength: float
    n_fisher_samples: int = 0


@dataclass(frozen=True)
class Recipe:
    """What one method asks of one trial. `trained_shots` are the labelled examples that are trained on."""

    trained_shots: tuple[Example, ...] = ()
    prompting: Prompting = Prompting()
    teacher: Distillation | None = None
    mixture: TaskMixture | None = None
    anchor: AnchorPenalty | None = None
