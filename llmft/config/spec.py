"""What one trial is: a frozen, strict description, and the digest that identifies it.

The digest covers everything that changes the answer and nothing else: the contents of the model and data folders count
(as fingerprints), their paths do not; nor do the device, the number of workers or the size of a micro-batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from llmft.config.base import StrictModel
from llmft.config.custom_task import CustomTask
from llmft.seeds import SEED_NAMES, SeedName

DIGEST_VERSION = 1
"""Raised when the same spec would give another answer (a mended method, another draw). Old records then count as stale."""


class ModelRef(StrictModel):
    """Which model: a hub name, or a local folder in hub format.

    `fingerprint` tells one content from another (`llmft.models.loading.resolve_model` fills it, and makes a hub model's `revision` the
    commit that it means); `path` is where the weights lie and does not count for the digest.
    """

    name: str
    revision: str = "main"
    fingerprint: str = ""
    path: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What tells it from other models: its content if known, which does not change when a folder is renamed."""
        return self.model_dump(include={"fingerprint"} if self.fingerprint else {"name", "revision", "fingerprint"})


class DataRef(StrictModel):
    """Which data: `directory` is a local folder, None the hub; `fingerprint` tells one content from another.

    `commits` are what the hub's revisions meant when the plan was read, (repository, revision, commit), so that every node loads
    the same. Like `directory` they say where the content is, and do not count for the digest.
    """

    fingerprint: str = ""
    directory: str | None = None
    commits: tuple[tuple[str, str, str], ...] = ()

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a repository's revision; None where it was not resolved."""
        return next((commit for *asked, commit in self.commits if asked == [repository, revision]), None)


class TaskRef(StrictModel):
    """A task beside the trial's own: its data, and its `definition` where it is the user's own."""

    data: DataRef = DataRef()
    definition: CustomTask | None = None


def pattern_of(patterns: Mapping[str, Any], wanted: str) -> str:
    """The name of the pattern in which a task beside the trial's own is asked: the trial's where it has one of that name, else its
    first."""
    return wanted if wanted in patterns else next(iter(patterns))


class FileRef(StrictModel):
    """A file or folder of the user's; its place does not count for the digest."""

    path: str
    fingerprint: str = ""


class ForgettingSpec(StrictModel):
    """What else a model could do: measured with the base model and with the adapted one (`llmft.trial.forgetting`)."""

    tasks: dict[str, DataRef] = Field(default_factory=dict, description="tasks of llmft, zero-shot on their in-domain set")
    harness: tuple[str, ...] = Field((), description="tasks of lm-evaluation-harness")
    harness_dir: FileRef | None = Field(None, description="a folder with further tasks in the harness's format")
    text: FileRef | None = Field(None, description="a text whose perplexity is measured")
    limit: int | None = Field(None, ge=1, description="examples of each task; null: all")


class TrainSpec(StrictModel):
    """How the weights are trained. The defaults are those of Mosbach et al. 2023, Table 7."""

    learning_rate: float = Field(1e-5, gt=0)
    epochs: int = Field(40, ge=1)
    batch_size: int = Field(32, ge=1, description="examples per optimiser step")
    optimizer: Literal["adamw", "adafactor", "sgd", "adamw_8bit"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps; rounds up to whole steps")
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    dropout: float | None = Field(None, ge=0, lt=1, description="null: as the model's configuration says")
    gradient_checkpointing: bool = False
    eval_every_epochs: int = Field(1, ge=1, description="how often the dev set is scored")
    patience: int | None = Field(
        None, ge=1, description="so many looks at dev in a row without a better one end the training; the schedule is that of all epochs"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each block to the one below it (llmft.training.optimizers)"
    )


class GenerationSpec(StrictModel):
    """How text is generated. The most probable token is taken each time, unless `temperature` or `num_beams` say otherwise.

    Sampling hangs on `TrialSpec.dropout_seed` and on the query alone, not on what stands in the same batch.
    """

    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, description="0: greedy, nothing is drawn")
    top_p: float = Field(1.0, gt=0, le=1, description="sampling: the smallest set of tokens with this share of the probability")
    top_k: int | None = Field(None, ge=1, description="sampling: among so many tokens; null: all")
    num_beams: int = Field(1, ge=1)
    stop: tuple[str, ...] | None = Field(None, description="the output ends before any of these; null: before the separator")

    @model_validator(mode="after")
    def _consistent(self) -> GenerationSpec:
        if self.temperature and self.num_beams > 1:
            raise ValueError("num_beams is for temperature 0: set num_beams to 1 to sample, or temperature to 0 for a beam search")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p and top_k need a temperature above 0; without one nothing is drawn")
        if "" in (self.stop or ()):
            raise ValueError("stop holds an empty text, before which every output would end; remove it")
        return self


Selection = Literal["none", "last", "best_dev", "best_in_domain", "best_out_of_domain"]
"""Which checkpoint a number belongs to; `none` where nothing is trained. The last two look at the reported sets (oracles)."""

ORACLES: tuple[Selection, ...] = ("best_in_domain", "best_out_of_domain")


class TrialSpec(StrictModel):
    """One model adapted once to one task with one method, shots, seed and hyper-parameters.

    `settings` are the method's own hyper-parameters, complete with their defaults (`llmft.methods._registry.complete_settings`).
    `definition` is the task itself where it is the user's own; None: `task` is a file in llmft/tasks.
    """

    model: ModelRef
    task: str
    definition: CustomTask | None = None
    data: DataRef = DataRef()
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    teacher: ModelRef | None = Field(None, description="the model that a distilled one learns from; null: the model itself")
    mixture: dict[str, TaskRef] = Field(default_factory=dict, description="other tasks that a multi-task method trains on")
    n_shots: int = Field(0, ge=0)
    shots_unit: Literal["total", "per_class"] = "total"
    draw: Literal["balanced", "random"] = Field("balanced", description="random: shots have the pool's shares of the labels")
    demonstrations: tuple[str, ...] = Field((), description="ids of the shots, in place of a draw")
    instruction: str = Field("", description="text that opens every prompt")
    pattern: str = "minimal"
    verbalizer: str = "default"
    separator: str = "\n\n"
    train: TrainSpec = TrainSpec()
    data_seed: int = 0
    order_seed: int = 0
    init_seed: int = 0
    dropout_seed: int = 0
    n_dev: int = Field(64, ge=0, description="held-out examples of the training pool that select, never reported")
    test_sets: tuple[str, ...] | None = Field(None, description="which of the task's test sets; null: all, empty: none, only dev")
    n_test: int | None = Field(None, ge=1, description="rows of each test set, balanced over labels and groups; null: all")
    max_length: int | None = Field(None, ge=8, description="tokens of a prompt; null: the model's context")
    generation: GenerationSpec | None = Field(None, description="of tasks that generate text; null for classification")
    selections: tuple[Selection, ...] = ("last", "best_dev")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    forgetting: ForgettingSpec | None = Field(None, description="measured beside the task; null: nothing")

    @model_validator(mode="after")
    def _consistent(self) -> TrialSpec:
        if "best_dev" in self.selections and self.n_dev == 0:
            raise ValueError("selection 'best_dev' needs dev examples: set n_dev above 0, or selections to ['last']")
        if self.train.patience and self.n_dev == 0:
            raise ValueError("train.patience needs dev examples: set n_dev above 0, or patience to null")
        if self.draw == "random" and self.shots_unit == "per_class":
            raise ValueError("shots_unit 'per_class' needs draw 'balanced'; a random draw gives a number in total")
        if self.demonstrations and self.n_shots != len(self.demonstrations):
            raise ValueError(f"demonstrations names {len(self.demonstrations)} examples; set n_shots to that (got {self.n_shots})")
        if len(set(self.demonstrations)) < len(self.demonstrations):
            raise ValueError("demonstrations names an example twice")
        if self.task in self.mixture:
            raise ValueError(f"mixture holds {self.task!r}, the trial's own task, which it shall be tested on; remove it")
        if self.test_sets == () and self.n_dev == 0:
            raise ValueError("nothing to score: name test_sets, or set n_dev above 0")
        return self

    @property
    def digest(self) -> str:
        """20 hexadecimal digits that identify the trial."""
        content = self.model_dump(mode="json")
        content["model"] = self.model.identity
        content["teacher"] = self.teacher and self.teacher.identity
        content["data"] = {"fingerprint": self.data.fingerprint}
        if self.definition:
            content["definition"] = self.definition.content(self.pattern, self.verbalizer)
        for name, other in self.mixture.items():
            definition = other.definition
            content["mixture"][name] = {
                "fingerprint": other.data.fingerprint,
                "definition": definition and definition.content(pattern_of(definition.patterns, self.pattern), "default"),
            }
        if wanted := self.forgetting:
            content["forgetting"] |= {
                "tasks": {name: data.fingerprint for name, data in wanted.tasks.items()},
                "harness_dir": wanted.harness_dir and wanted.harness_dir.fingerprint,
                "text": wanted.text and wanted.text.fingerprint,
            }
        canonical = json.dumps({"version": DIGEST_VERSION, **content}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:20]

    @property
    def cell(self) -> tuple[str, str, str, int, str]:
        """(model, task, method, n_shots, pattern): what a table row compares."""
        return self.model.name, self.task, self.method, self.n_shots, self.pattern

    def with_seed(self, seed: int, names: Iterable[SeedName] = SEED_NAMES) -> TrialSpec:
        """Copy the spec with the seeds called `names`, by default all four, set to `seed`."""
        return self.model_copy(update={f"{name}_seed": seed for name in names})
