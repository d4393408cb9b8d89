"""What one trial leaves behind: its record, all of which is plain data. `llmft.records.record_files` writes and reads it.

This module imports neither torch nor Ray nor pandas, so that the analysis can read records anywhere.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llmft.config import TrialSpec
from llmft.errors import Cause

SCHEMA_VERSION = 1

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured number; JSON has no NaN, so null stands for it."""


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Finding(Data):
    """A warning that travels with a number.

    `code` is stable (`constant_prediction`, ...; all are listed in `llmft.evaluation.findings.CODES`); `set` and `selection` say which
    number it concerns (None: the whole trial).
    """

    code: str
    severity: Literal["note", "warning", "error"]
    message: str
    set: str | None = None
    selection: str | None = None
    value: float | None = None


class SetMetrics(Data):
    """The numbers of one test set under one selection. Shares and scores in [0, 1]; NaN is written as null.

    `score` is the number that comparisons are about, and `metric` its name: the accuracy, for classification. The numbers after it
    are of classification, those from `rouge1` on of generated text (`llmft.evaluation.text_metrics`); a set has one or the other.
    `accuracy` is micro, under the restricted rule (the best of the label words); `full_vocabulary_accuracy` demands that the
    best of all words is the right label word; `non_label_share` is how often the best of all words is no label word (both
    null for methods with a classification head). `loss` is the mean restricted negative log-likelihood in nats.
    """

    n: int
    metric: str = "accuracy"
    score: Number
    accuracy: Number = math.nan
    macro_accuracy: Number = math.nan
    macro_f1: Number = math.nan
    mcc: Number = math.nan
    calibration_error: Number = math.nan
    loss: Number = math.nan
    full_vocabulary_accuracy: float | None = None
    non_label_share: float | None = None
    majority_share: Number = Field(math.nan, description="accuracy of always giving the most frequent label")
    label_shares: dict[str, float] = Field(default_factory=dict, description="share of each label among the gold labels")
    predicted_shares: dict[str, float] = Field(default_factory=dict, description="share of each label among the predictions")
    label_accuracy: dict[str, float] = Field(default_factory=dict, description="recall of each label")
    group_accuracy: dict[str, dict[str, float]] = Field(default_factory=dict, description="grouping -> value -> accuracy")
    domain: Literal["in", "out"] = "in"
    rouge1: float | None = None
    rouge2: float | None = None
    rougeL: float | None = None
    rougeLsum: float | None = None
    bleu: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    bleu_signature: str | None = Field(None, description="sacrebleu's: how BLEU was computed, and its version")
    empty_share: float | None = Field(None, description="share of outputs without text")
    cut_share: float | None = Field(None, description="share of outputs that did not end within the most tokens allowed")


class CurvePoint(Data):
    """One look at the dev set during training."""

    step: int
    epoch: int
    train_loss: Number
    learning_rate: float
    dev_score: float | None = None
    dev_loss: float | None = None


class Draws(Data):
    """Which examples were drawn."""

    shots: list[str] = Field(default_factory=list, description="ids, in the order of the draw")
    dev: list[str] = Field(default_factory=list)
    unlabelled: list[str] = Field(default_factory=list, description="ids of examples that were used without their labels")
    demonstrations: list[str] = Field(default_factory=list, description="ids in the prompt, in order")
    n_demonstrations_dropped: int = 0
    shots_hash: str = ""


class VirtualToken(Data):
    """A token of a learned prompt: the words of the vocabulary whose embeddings are nearest to it, nearest first.

    `cosine` maps each to its cosine similarity, `distance` to its L2 distance; `norm` is the length of the token's embedding.
    """

    cosine: dict[str, Number]
    distance: dict[str, Number]
    norm: Number


class Mixed(Data):
    """What was trained on of one other task: `n` examples of the `n_pool` in its training pool, at this rate, in this pattern."""

    task: str
    pattern: str
    n_pool: int
    rate: float
    n: int


class TeacherRound(Data):
    """One reading of the lessons: how good the teacher was then, on the dev examples with what its prompt holds, and how many of its
    `n_asked` answers were trained towards."""

    dev_score: float | None = None
    n_asked: int
    n_trusted: int


class Teacher(Data):
    """The model that a distilled one learned from, and how good it is: the score on the dev examples with what its prompt holds,
    and without.

    After the first of several `rounds` the teacher is the student itself, as it was trained until then. Texts have no rounds.
    """

    model: str
    dev_score: float | None = None
    zero_shot_dev_score: float | None = None
    demonstrations: list[str] = Field(default_factory=list, description="ids in the prompt of its first lesson, in order")
    n_demonstrations_dropped: int = 0
    n_parameters: int = 0
    n_tokens: int = Field(0, description="tokens that it read, and generated")
    n_asked: int = Field(0, description="inputs that it should answer with a text")
    n_responses: int = Field(0, description="of these answers, those that were trained on")
    n_empty: int = Field(0, description="answers without text, which were left out")
    n_unfinished: int = Field(0, description="texts that were cut at the most tokens allowed")
    rounds: list[TeacherRound] = Field(default_factory=list, description="what its targets were worth, round by round")
    wall_s: float = 0.0


class Cost(Data):
    """What the trial took. Times in seconds, memory in bytes."""

    wall_s: float
    train_s: float = Field(0.0, description="with the looks at dev, and what a student reads between its rounds")
    evaluate_s: float = 0.0
    forgetting_s: float = Field(0.0, description="what else the adapted model can do was measured in; beside wall_s")
    device: str = "cpu"
    peak_memory_bytes: int = Field(0, description="device memory, on a CPU growth of the resident set; of the process that took most")
    tokens_trained: int = Field(0, description="tokens read forward and backward: in training, and before it for a Fisher information")
    tokens_evaluated: int = 0
    tokens_teacher: int = Field(0, description="tokens that the teacher of a distillation read, in all rounds")
    n_parameters: int = 0
    n_trainable_parameters: int = 0
    stored_bytes: int = Field(0, description="what must be kept to use the adapted model, beside the base model")
    tokens_per_query: float = Field(0.0, description="mean prompt length at inference, demonstrations included")
    flops: float = Field(0.0, description="estimate: 6 per parameter and trained token, 2 per evaluated or teacher's token")
    n_steps: int = 0
    n_workers: int = Field(1, description="processes that ran the trial together; their number changes the noise of dropout")
    micro_batch_tokens: int | None = Field(None, description="bound of the tokens in one forward pass; null: not recorded")
    n_out_of_memory: int = Field(0, description="times the trial ran out of memory and was started again with smaller passes")


class Measure(Data):
    """One number that says what else a model can do.

    `source` is "llmft" or "harness" (`name` is a task of theirs), or "text" (a file's name). `n` counts examples, or tokens.
    """

    source: Literal["llmft", "harness", "text"]
    name: str
    metric: str
    value: Number
    stderr: float | None = None
    n: int | None = None
    larger_is_better: bool = True

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.name, self.metric


class Change(Data):
    """The same number of the base model (`before`; null: not measured) and of the adapted one (`after`)."""

    before: Measure | None
    after: Measure


class Evaluation(Data):
    """What `llmft evaluate` measured with a trial's weights, beside its record.

    `limit` and `packages` are those of the last run; a number that was measured again stands once.
    """

    schema_version: int = SCHEMA_VERSION
    digest: str
    changes: list[Change]
    limit: int | None = None
    weights_sha256: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)


class TrialRecord(Data):
    """One trial's whole result. Anything a table needs is in here."""

    schema_version: int = SCHEMA_VERSION
    digest: str
    spec: TrialSpec
    status: Literal["finished", "failed"]
    cause: Cause | None = None
    message: str = ""
    dev_score: dict[str, float] = Field(default_factory=dict, description="selection -> the task's metric on the dev examples")
    dev_loss: dict[str, Number] = Field(default_factory=dict)
    selected_step: dict[str, int] = Field(default_factory=dict, description="selection -> optimiser step of the checkpoint")
    metrics: dict[str, dict[str, SetMetrics]] = Field(default_factory=dict, description="selection -> set -> numbers")
    curve: list[CurvePoint] = Field(default_factory=list)
    findings: list[Finding] = Field(default_factory=list)
    draws: Draws = Field(default_factory=Draws)
    weight_distance: dict[str, Number] = Field(
        default_factory=dict,
        description="selection -> Euclidean distance of the base model's weights from their start: LoRA and (IA)3 count as merged, new "
        "parts (a head, a soft prompt, a bottleneck) not at all",
    )
    virtual_tokens: list[VirtualToken] = Field(default_factory=list, description="the learned prompt, in its order")
    content_free: dict[str, Number] = Field(
        default_factory=dict, description="label -> mean probability for queries without content, by which scores are calibrated"
    )
    teacher: Teacher | None = None
    mixture: list[Mixed] = Field(default_factory=list, description="the other tasks that were trained on")
    forgetting: list[Change] = Field(default_factory=list, description="what else the model could do before and can after")
    cost: Cost | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    predictions_sha256: str | None = None
    weights_sha256: str | None = None
    responses_sha256: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"
