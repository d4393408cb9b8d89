"""Context distillation (Askell et al. 2021, appendix B.5; Snell et al. 2022): what a prompt tells the model is trained into its weights.

The teacher is the same model, untouched, or a larger one of its family (`teacher` of a plan's entry), with the shots as
demonstrations in its prompt, or an instruction, or both. The student reads the query alone and is trained towards what the
teacher predicts at the same position, after the query:

    (1 - w) T^2 mean_x D(teacher(x | context) || student(x))  +  w mean_(x, y) -log student(y | x)

The first mean is over all inputs that are selected, the second over the labelled shots; w is `cross_entropy_weight`, T the
temperature of both distributions in D (w = 0 and T = 1: pure distillation). The teacher answers once, before the training.

Recursive distillation (Snell et al. 2022): in each of the `rounds` after the first, the student as the last epoch left it is the
next teacher. It reads the same context, and goes on from its own weights towards its own new answers, since teacher and student are
one model at the start of every distillation. A round is `epochs` long and has an optimizer, a warm-up and a schedule of its own;
checkpoints are selected over all rounds. The record says how good the teacher of each round is on dev: a student that was trained
on queries alone may read demonstrations worse than before, a whole model more so than one with lora or a soft prompt.

Selective distillation: not every answer of the teacher need be learned from. With `only_correct`, of the labelled inputs only those
are whose label the teacher finds best, and the others have their cross-entropy alone (Meng et al. 2019, conditional
teacher-student learning); unlabelled inputs all are, since nothing is known of them. With `min_confidence`, only those are for which
the teacher's best label has at least this probability among the labels (0.95 in Sohn et al. 2020, FixMatch). The choice is made
anew in each round, and the record counts it.

What it is trained on: `n_unlabelled` examples of the training pool, whose labels are never read; other methods do not see these
texts, which a comparison should say. With `distil_shots` the labelled shots as well. No shot stands in the prompt in which the
teacher reads it: the whole group of shots with which it was drawn (one of each label) is left out there, so that the
demonstrations stay balanced; leaving out one alone would tell its label by what is missing.

D (`distance`) is the forward KL, or js, mse or l1 (see `llmft.methods.modules.divergence`; the last two on probabilities), or
pseudo_labels, the cross-entropy with the label that the teacher finds best. It is taken `over` the label words (of several
tokens: over the words as wholes), over the teacher's top_k tokens and a rest for all others, or over the whole vocabulary; the
last two wherever an answer may go on, each position weighted with the teacher's probability of reaching it. The cross-entropy is
over the label words in the first case, else over the vocabulary.

The student is any method that trains, by its name (pattern, lora, vanilla, ...), with `student_settings`. One with a head of its
own has no words but the labels. Learning rates are those of the student: 1e-5 for whole models; give more for lora.

Controls for a causal claim: `teacher_context: none` (a teacher that reads what the student reads) and shuffled_labels (every
demonstration has a wrong label; with two labels, the other one), both with the same draws.

Published settings, in the plan context_distillation: Askell's is `over: top_k, k: 50`; equal weights of KL and cross-entropy on
the shots is `n_unlabelled: 0, distil_shots: true, cross_entropy_weight: 0.5` with 40 epochs of batches of 32, learning rate 1e-5
after 10 % of warm-up, dropout 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._recipe import Distillation, Recipe, TeacherPrompt, TrialContext
from llmft.methods._registry import method_class
from llmft.methods._student import ByStudent, StudentSettings
from llmft.methods._types import LoadedModel, QueryBatch, Tensor
from llmft.seeds import stream

if TYPE_CHECKING:
    import numpy as np

    from llmft.data import Example
    from llmft.prompting import LabelWords


class DistillationSettings(StudentSettings):
    teacher_context: Literal["demonstrations", "instruction", "shuffled_labels", "none"] = Field(
        "demonstrations", description="what stands in the teacher's prompt"
    )
    instruction: str = Field("", description="opens the teacher's prompt, with or without demonstrations")
    n_unlabelled: int = Field(128, ge=0, description="examples of the training pool that are taught without their labels")
    distil_shots: bool = Field(False, description="the labelled shots are taught as well")
    distance: Literal["kl", "js", "mse", "l1", "pseudo_labels"] = Field("kl", description="between the teacher's answer and the student's")
    over: Literal["label_words", "top_k", "vocabulary"] = Field("label_words", description="what an answer's probabilities are over")
    k: int = Field(50, ge=1, description="tokens of the teacher, for top_k")
    temperature: float = Field(1.0, gt=0, description="of both distributions")
    cross_entropy_weight: float = Field(0.0, ge=0, le=1, description="share of the shots' own labels in the loss")
    rounds: int = Field(1, ge=1, description="after each but the last, the student is the next teacher")
    only_correct: bool = Field(False, description="of labelled inputs, learn only from answers in which the right label is best")
    min_confidence: float = Field(0.0, ge=0, le=1, description="learn only from answers whose best label has this probability")

    @model_validator(mode="after")
    def _consistent(self) -> DistillationSettings:
        if not self.n_unlabelled and not self.distil_shots:
            raise ValueError("there is nothing to train on: set n_unlabelled above 0, or distil_shots to true")
        if self.cross_entropy_weight and not self.distil_shots:
            raise ValueError("cross_entropy_weight needs labelled inputs: set distil_shots to true, or the weight to 0")
        if self.over != "label_words" and method_class(self.student).has_own_head:
            raise ValueError(f"over: the student {self.student!r} has a head of its own, which knows no words: use label_words")
        if self.rounds > 1 and method_class(self.student).has_own_head:
            raise ValueError(
                f"rounds: the student {self.student!r} has a head of its own, which cannot say what a teacher says in words: use 1, "
                "or a student such as pattern"
            )
        if self.only_correct and not self.distil_shots:
            raise ValueError("only_correct needs labelled inputs: set distil_shots to true, or only_correct to false")
        if self.student_settings.get("penalty") == "kl_to_base":
            raise ValueError("student_settings.penalty: kl_to_base is part of the loss that distillation replaces: use l2_sp")
        if self.distance == "pseudo_labels" and self.over == "top_k":
            raise ValueError("over: pseudo_labels are label words: use label_words or vocabulary")
        if bool(self.instruction) < (self.teacher_context == "instruction"):
            raise ValueError("teacher_context: instruction needs an instruction: a text that tells the task")
        if self.instruction and self.teacher_context == "none":
            raise ValueError("instruction: a teacher without context has none; remove it, or set teacher_context to instruction")
        return self


class ContextDistillation(ByStudent):
    kinds = ("classification",)
    uses_teacher = True
    Settings = DistillationSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-3, log=True)}
    paper = "Askell et al. 2021"

    def recipe(self, trial: TrialContext) -> Recipe:
        settings, spec = self.settings, trial.spec
        if settings.rounds > 1 and spec.teacher not in (None, spec.model):
            raise UserError(
                f"rounds: after the first the student is the teacher, and this one has another, {spec.teacher.name}. Remove the teacher, "
                "or set rounds to 1."
            )
        teacher = Distillation(self.teacher_prompts(trial), self.targets, self.count_selected, settings.n_unlabelled, settings.rounds)
        shots = trial.draw.shots if settings.distil_shots else ()
        return replace(self.student.recipe(trial), trained_shots=shots, teacher=teacher)

    def teacher_prompts(self, trial: TrialContext) -> tuple[TeacherPrompt, ...]:
        """Return the prompt of the unlabelled examples, and one of each group of shots, in which the group is left out."""
        settings, draw, n_unlabelled = self.settings, trial.draw, self.settings.n_unlabelled
        if settings.teacher_context not in ("demonstrations", "shuffled_labels"):
            n_examples = n_unlabelled + (len(draw.shots) if settings.distil_shots else 0)
            return (TeacherPrompt(tuple(range(n_examples)), (), settings.instruction),)
        n_labels = len({example.label for example in draw.shots})
        groups = [draw.shots[start : start + n_labels] for start in range(0, len(draw.shots), n_labels)]
        if settings.distil_shots and len(groups) < 2:
            raise UserError(
                "n_shots: with one shot of each label none is left to demonstrate the task for it. Use more shots, or set "
                "distil_shots to false."
            )
        if settings.teacher_context == "shuffled_labels":
            generator = stream(trial.spec.data_seed, "lessons")
            groups = [mislabel(group, n_labels, generator) for group in groups]
        prompts = [TeacherPrompt(tuple(range(n_unlabelled)), sum(groups, ()), settings.instruction)]
        if settings.distil_shots:
            for number in range(len(groups)):
                positions = range(n_unlabelled + number * n_labels, n_unlabelled + (number + 1) * n_labels)
                others = sum(groups[:number] + groups[number + 1 :], ())
                prompts.append(TeacherPrompt(tuple(positions), others, settings.instruction))
        return tuple(prompt for prompt in prompts if prompt.examples or draw.dev)

    def targets(self, model: LoadedModel, batch: QueryBatch) -> dict[str, Tensor]:
        """Compute the teacher's log-probabilities at each position, how probable the positions are, and what is selected."""
        import torch

        from llmft.methods.modules.divergence import keep_and_sum_rest
        from llmft.models import answer_logits, label_word_scores, word_log_probabilities

        settings, label_words, labels = self.settings, batch.label_words, batch.labels
        assert label_words is not None and labels is not None
        if settings.over == "label_words" or settings.distance == "pseudo_labels":
            scores = label_word_scores(model, batch).labels.float()[:, None]  # [queries, 1, labels]
            return self.selection(scores[:, 0], labels) | {
                "outcomes": (scores / settings.temperature).log_softmax(-1),
                "reached": torch.ones_like(scores[..., 0]),
            }
        logits = answer_logits(model, batch)  # [queries, positions, vocabulary]
        outcomes, words = (logits / settings.temperature).log_softmax(-1), logits.log_softmax(-1)
        kept = self.selection(word_log_probabilities(words, label_words), labels)
        kept["reached"] = probability_of_beginnings(words, label_words)
        if settings.over == "vocabulary":
            return kept | {"outcomes": outcomes}
        top = outcomes.topk(min(settings.k, outcomes.shape[-1] - 1), dim=-1).indices
        return kept | {"outcomes": keep_and_sum_rest(outcomes, top), "top": top}

    def selection(self, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute which examples have a label, and whose divergence counts, [queries] each, as 1 or 0.

        Args:
            scores: the teacher's log-probabilities of the label words, up to a constant, [queries, labels].
            labels: the right ones, [queries]; below 0 where there is none.
        """
        is_labelled, selected = labels >= 0, scores.softmax(-1).amax(-1) >= self.settings.min_confidence
        if self.settings.only_correct:
            selected &= ~is_labelled | (scores.argmax(-1) == labels)
        return {"is_labelled": is_labelled.float(), "selected": selected.float()}

    def count_selected(self, targets: Mapping[str, Tensor]) -> int:
        """Count the examples whose targets are learned from; none is a UserError."""
        selected = targets["selected"]
        if not (n := int(selected.sum())):
            wanted = [f"min_confidence {self.settings.min_confidence:g}"] if self.settings.min_confidence else []
            wanted += ["only_correct"] if self.settings.only_correct else []
            raise UserError(
                f"{' and '.join(wanted)}: none of the teacher's {len(selected)} answers is so good, and there is nothing to learn. Ask for "
                "less, or give the teacher more shots or another context."
            )
        return n

    def loss(self, model: LoadedModel, batch: QueryBatch) -> Tensor:
        import torch.nn.functional as F

        from llmft.methods.modules.divergence import divergence, keep_and_sum_rest
        from llmft.models import answer_logits, word_log_probabilities

        settings, rows, label_words, gold = self.settings, batch.indices.cpu(), batch.label_words, batch.labels
        assert label_words is not None and gold is not None
        teacher = {name: values[rows].to(gold.device) for name, values in self.teacher_targets.items()}
        if settings.over == "label_words":
            logits = self.scores(model, batch).labels.float()[:, None]  # [queries, 1, labels]
            labels = logits[:, 0].log_softmax(-1)  # [queries, labels]
        else:
            logits = answer_logits(model, batch)  # [queries, positions, vocabulary]
            labels = word_log_probabilities(logits.log_softmax(-1), label_words)
        weight = settings.cross_entropy_weight
        if settings.distance == "pseudo_labels":
            apart = F.nll_loss(labels, teacher["outcomes"][:, 0].argmax(-1), reduction="none")  # [queries]
        else:
            outcomes = (logits / settings.temperature).log_softmax(-1)
            if settings.over == "top_k":
                outcomes = keep_and_sum_rest(outcomes, teacher["top"])
            apart = (teacher["reached"] * divergence(settings.distance, teacher["outcomes"], outcomes)).sum(1)  # [queries]
            apart = settings.temperature**2 * apart
        # a batch holds some that are selected, and some that are labelled, or none
        loss = (1 - weight) * (teacher["selected"] * apart).mean() / self.teacher_targets["selected"].mean()
        if not weight:
            return loss
        right = F.nll_loss(labels, gold, ignore_index=-1, reduction="sum") / len(batch)
        return loss + weight * right / self.teacher_targets["is_labelled"].mean()


def mislabel(group: tuple[Example, ...], n_labels: int, generator: np.random.Generator) -> tuple[Example, ...]:
    """Return the examples of one group (one of each label), each with the label of another."""
    shift = int(generator.integers(1, n_labels))
    return tuple(replace(example, label=((example.label or 0) + shift) % n_labels) for example in group)


def probability_of_beginnings(log_probabilities: Tensor, words: LabelWords) -> Tensor:
    """Compute how probable it is that an answer reaches each of `words.continuation_prefixes`, [queries, positions].

    Args:
        log_probabilities: of all tokens at these positions, [queries, positions, vocabulary].
    """
    import torch

    position = {beginning: i for i, beginning in enumerate(words.continuation_prefixes)}
    first = torch.zeros_like(log_probabilities[:, 0, 0])
    return torch.stack(
        [
            sum((log_probabilities[:, position[beginning[:i]], token] for i, token in enumerate(beginning)), first)
            for beginning in words.continuation_prefixes
        ],
        1,
    ).exp()


METHOD = ContextDistillation
