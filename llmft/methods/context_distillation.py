"""Context distillation (Askell et al. 2021, appendix B.5; Snell et al. 2022): what a prompt tells the model is trained into its weights.

The teacher is the same model, untouched, or a larger one of its family (`teacher` of a plan's entry), with the shots as
demonstrations in its prompt, or an instruction, or both. The student reads the query alone and is trained towards what the
teacher says in the same place, after the query:

    (1 - w) T^2 mean_x D(teacher(x | context) || student(x))  +  w mean_(x, y) -log student(y | x)

The first mean is over all inputs, the second over the labelled shots; w is `cross_entropy_weight`, T the temperature of both
distributions in D (w = 0 and T = 1: pure distillation). The teacher answers once, before the training.

What it is trained on: `n_unlabelled` examples of the training pool, whose labels are never read; other methods do not see these
texts, which a comparison should say. With `distil_shots` the labelled shots as well. No shot stands in the prompt in which the
teacher reads it: the whole round of shots in which it was drawn (one of each label) is left out there, so that the
demonstrations stay balanced; leaving out one alone would tell its label by what is missing.

D (`distance`) is the forward KL, or js, mse or l1 (see `llmft.divergence`; the last two on probabilities), or pseudo_labels, the
cross-entropy with the label that the teacher finds best. It is taken `over` the label words (of several tokens: over the words as
wholes), over the teacher's top_k words and a rest for all others, or over the whole vocabulary; the last two wherever an answer
may go on, each place weighted with the teacher's probability of coming there. The cross-entropy is over the label words in the
first case, else over the vocabulary.

The student is any method that trains, by its name (pattern, lora, vanilla, ...), with `student_settings`. One with a head of its
own has no words but the labels. Learning rates are those of the student: 1e-5 for whole models; give more for lora.

Controls for a causal claim: `teacher_context: none` (a teacher that reads what the student reads) and shuffled_labels (every
demonstration has a wrong label; with two labels, the other one), both with the same draws.

Published settings, in the plan context_distillation: Askell's is `over: top_k, k: 50`; equal weights of KL and cross-entropy on
the shots is `n_unlabelled: 0, distil_shots: true, cross_entropy_weight: 0.5` with 40 epochs of batches of 32, learning rate 1e-5
after 10 % of warm-up, dropout 0.1.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmft.errors import UserError
from llmft.method import Lesson, Method, Range
from llmft.registry import METHODS, build_method, complete_settings, method_class
from llmft.spec import Spec


class DistillationSettings(Spec):
    student: str = "pattern"
    student_settings: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    teacher_context: Literal["demonstrations", "instruction", "shuffled_labels", "none"] = "demonstrations"
    instruction: str = ""  # opens the teacher's prompt, with or without demonstrations
    n_unlabelled: int = Field(128, ge=0)
    distil_shots: bool = False
    distance: Literal["kl", "js", "mse", "l1", "pseudo_labels"] = "kl"
    over: Literal["label_words", "top_k", "vocabulary"] = "label_words"
    k: int = Field(50, ge=1)
    temperature: float = Field(1.0, gt=0)
    cross_entropy_weight: float = Field(0.0, ge=0, le=1)

    @field_validator("student")
    @classmethod
    def _can_learn(cls, name: str) -> str:
        if name not in METHODS or name == "context_distillation" or not method_class(name).trains:
            raise ValueError("the student must be another method that trains, such as pattern, lora or vanilla")
        if method_class(name).context is not Method.context:
            raise ValueError(f"a student reads the query alone, and {name!r} reads demonstrations: use pattern")
        return name

    @field_validator("student_settings")
    @classmethod
    def _complete(cls, settings: dict[str, Any], info: Any) -> dict[str, Any]:
        if "student" not in info.data:  # which is a mistake of its own
            return settings
        try:
            return complete_settings(info.data["student"], settings)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self):
        if not self.n_unlabelled and not self.distil_shots:
            raise ValueError("there is nothing to train on: set n_unlabelled above 0, or distil_shots to true")
        if self.cross_entropy_weight and not self.distil_shots:
            raise ValueError("cross_entropy_weight needs labelled inputs: set distil_shots to true, or the weight to 0")
        if self.over != "label_words" and method_class(self.student).has_own_head:
            raise ValueError(
                f"over: the student {self.student!r} has a head of its own, which knows no words: use label_words"
            )
        if self.student_settings.get("penalty") == "kl_to_base":
            raise ValueError("student_settings.penalty: kl_to_base is part of the loss that distillation replaces: use l2_sp")
        if self.distance == "pseudo_labels" and self.over == "top_k":
            raise ValueError("over: pseudo_labels are label words: use label_words or vocabulary")
        if bool(self.instruction) < (self.teacher_context == "instruction"):
            raise ValueError("teacher_context: instruction needs an instruction: a text that tells the task")
        if self.instruction and self.teacher_context == "none":
            raise ValueError("instruction: a teacher without context has none; remove it, or set teacher_context to instruction")
        return self


class ContextDistillation(Method):
    kinds = ("classification",)
    Settings = DistillationSettings
    search = {"learning_rate": Range(1e-6, 1e-3, log=True)}
    paper = "Askell et al. 2021"

    def __init__(self, settings=None):
        super().__init__(settings)
        self.student = build_method(self.settings.student, self.settings.student_settings)
        for name in ("has_own_head", "n_virtual_tokens", "base_weights", "pull_to_start"):
            setattr(self, name, getattr(self.student, name))
        for hook in ("read", "prepare", "begin", "condition", "scores", "fold", "virtual_tokens", "peft_adapter"):
            setattr(self, hook, getattr(self.student, hook))

    def __getattr__(self, name):
        """What else the student computes through `Adapted`."""
        if name == "student":
            raise AttributeError(name)
        return getattr(self.student, name)

    @property
    def n_unlabelled(self):
        return self.settings.n_unlabelled

    def inputs(self, draw):
        return draw.unlabelled + (draw.shots if self.settings.distil_shots else ())

    def lessons(self, draw, generator):
        settings, n_unlabelled = self.settings, len(draw.unlabelled)
        shown = settings.teacher_context in ("demonstrations", "shuffled_labels")
        if not shown:
            return (Lesson(tuple(range(len(self.inputs(draw)))), (), settings.instruction),)
        n_labels = len({example.label for example in draw.shots})
        rounds = [draw.shots[start : start + n_labels] for start in range(0, len(draw.shots), n_labels)]
        if settings.distil_shots and len(rounds) < 2:
            raise UserError(
                "n_shots: with one shot of each label none is left to demonstrate the task for it. Use more shots, or set "
                "distil_shots to false."
            )
        texts = [mislabel(group, n_labels, generator) if settings.teacher_context == "shuffled_labels" else group for group in rounds]
        lessons = [Lesson(tuple(range(n_unlabelled)), sum(texts, ()), settings.instruction)]
        if settings.distil_shots:
            for number in range(len(rounds)):
                places = range(n_unlabelled + number * n_labels, n_unlabelled + (number + 1) * n_labels)
                lessons.append(Lesson(tuple(places), sum(texts[:number] + texts[number + 1 :], ()), settings.instruction))
        return tuple(lesson for lesson in lessons if lesson.inputs or draw.dev)

    def targets(self, model, batch):
        import torch

        from llmft.divergence import keep_and_sum_rest
        from llmft.scoring import answer_logits, label_word_scores

        settings, is_labelled = self.settings, (batch.labels >= 0).float()
        if settings.over == "label_words" or settings.distance == "pseudo_labels":
            scores = label_word_scores(model, batch).labels.float()[:, None]  # [queries, 1, labels]
            return {
                "outcomes": (scores / settings.temperature).log_softmax(-1),
                "reached": torch.ones_like(scores[..., 0]),
                "is_labelled": is_labelled,
            }
        logits = answer_logits(model, batch)  # [queries, places, vocabulary]
        outcomes = (logits / settings.temperature).log_softmax(-1)
        kept = {"reached": probability_of_beginnings(logits.log_softmax(-1), batch.words), "is_labelled": is_labelled}
        if settings.over == "vocabulary":
            return kept | {"outcomes": outcomes}
        top = outcomes.topk(min(settings.k, outcomes.shape[-1] - 1), dim=-1).indices
        return kept | {"outcomes": keep_and_sum_rest(outcomes, top), "top": top}

    def loss(self, model, batch):
        import torch.nn.functional as F

        from llmft.divergence import divergence, keep_and_sum_rest
        from llmft.scoring import answer_logits, word_log_probabilities

        settings, rows = self.settings, batch.indices.cpu()
        taught = {name: values[rows].to(batch.labels.device) for name, values in self.taught.items()}
        if settings.over == "label_words":
            logits = self.scores(model, batch).labels.float()[:, None]  # [queries, 1, labels]
            labels = logits[:, 0].log_softmax(-1)  # [queries, labels]
        else:
            logits = answer_logits(model, batch)  # [queries, places, vocabulary]
            labels = word_log_probabilities(logits.log_softmax(-1), batch.words)
        weight = settings.cross_entropy_weight
        if settings.distance == "pseudo_labels":
            loss = (1 - weight) * F.nll_loss(labels, taught["outcomes"][:, 0].argmax(-1))
        else:
            outcomes = (logits / settings.temperature).log_softmax(-1)
            if settings.over == "top_k":
                outcomes = keep_and_sum_rest(outcomes, taught["top"])
            apart = (taught["reached"] * divergence(settings.distance, taught["outcomes"], outcomes)).sum(1)  # [queries]
            loss = (1 - weight) * settings.temperature**2 * apart.mean()
        if not weight:
            return loss
        right = F.nll_loss(labels, batch.labels, ignore_index=-1, reduction="sum") / len(batch)
        return loss + weight * right / self.taught["is_labelled"].mean()  # a batch holds some labelled inputs, or none


def mislabel(group, n_labels, generator):
    """The examples of one round (one of each label), each with the label of another."""
    from dataclasses import replace

    shift = int(generator.integers(1, n_labels))
    return tuple(replace(example, label=(example.label + shift) % n_labels) for example in group)


def probability_of_beginnings(log_probabilities, words):
    """How probable it is that an answer comes to each of `words.beginnings`, [queries, places].

    Args:
        log_probabilities: of all words at these places, [queries, places, vocabulary].
    """
    import torch

    place = {beginning: i for i, beginning in enumerate(words.beginnings)}
    first = torch.zeros_like(log_probabilities[:, 0, 0])
    return torch.stack(
        [
            sum((log_probabilities[:, place[beginning[:i]], token] for i, token in enumerate(beginning)), first)
            for beginning in words.beginnings
        ],
        1,
    ).exp()


METHOD = ContextDistillation
