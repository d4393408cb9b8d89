"""A plan: the YAML file that says which trials to run.

Where a training hyper-parameter comes from, later ones winning:
defaults of `TrainSpec` < the method's `train_defaults` < the plan's `train` < the entry's `train` < the search.
How text is generated: defaults of `GenerationSpec` < the task's `generation_defaults` < the plan's `generation`.
What a plan fixes is not searched: a name in `train` or in an entry's `settings` leaves the method's search space, unless the
entry's own `search` names it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmft.config import ORACLES, CustomTask, Selection, StrictModel, TaskEntry
from llmft.seeds import SEED_NAMES, SeedName
from llmft.tasks import TASKS


class ModelName(StrictModel):
    """Which model: a hub name, a local folder in hub format, or "toy"."""

    name: str
    revision: str = "main"


class ModelEntry(ModelName):
    """A hub name, a local folder in hub format, or "toy", the small model that comes with llmft; and what each of its trials gets.

    What is left out is chosen by the memory that a trial needs (`sweeps.resources.placement`). On a machine without GPUs a trial gets none.
    """

    gpus: float | None = Field(None, ge=0, description="in all: a share of one GPU, or a number of them, one for each process")
    workers: int | None = Field(None, ge=1, description="processes that train together, with a GPU each where there are any")
    parallel: Literal["ddp", "fsdp"] | None = Field(None, description="how several train together: the whole model in each, or a part")

    @model_validator(mode="after")
    def _consistent(self) -> ModelEntry:
        gpus, workers = self.gpus, self.workers
        if gpus is not None and gpus > 1 and gpus % 1:
            raise ValueError(f"gpus: {gpus:g} is neither a share of one GPU nor a whole number; use {int(gpus)} or {int(gpus) + 1}")
        if gpus and workers and workers != max(1, gpus):
            raise ValueError(
                f"workers: {workers} contradicts gpus: {gpus:g}, which means {max(1, int(gpus))} with "
                f"{'a share of one' if gpus < 1 else 'one each'}; remove workers, or set gpus to {workers}"
            )
        if self.parallel and not self.in_group:
            raise ValueError(f"parallel: {self.parallel} needs several processes; set gpus (or workers) to 2 or more, or remove it")
        return self

    @property
    def in_group(self) -> bool:
        """Whether several processes are asked for, that train together."""
        return max(self.workers or 1, self.gpus or 1) > 1


class RangeEntry(StrictModel):
    """What is tried for one hyper-parameter: a number from `low` to `high`, or one of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> RangeEntry:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give either low and high, or choices")
        if self.choices:
            if any(choice in self.choices[:index] for index, choice in enumerate(self.choices)):
                raise ValueError("choices names a value twice")
            return self
        if self.low is None or self.high is None or not -1e300 < self.low < self.high < 1e300:
            raise ValueError("low must be a number below high")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 where log is true")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("low and high must be whole numbers where integer is true")
        return self


class MethodEntry(StrictModel):
    """One method in a plan, and where it departs from the rest of the plan.

    The entry's name is the method's, unless `method` says another: so one method can stand in a plan more than once.
    A search range of null leaves that hyper-parameter at its default.
    """

    method: str | None = None
    teacher: ModelName | None = Field(None, description="which model a distilled one learns from; null: from itself")
    mixture: tuple[str, ...] = Field((), description="other tasks that a multi-task method trains on; the trial's own is left out")
    settings: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, RangeEntry | None] = Field(default_factory=dict)
    n_shots: tuple[int, ...] | None = Field(None, min_length=1)
    pattern: str | None = None
    verbalizer: str | None = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _fixed_or_searched(self) -> MethodEntry:
        both = sorted((set(self.settings) | set(self.train)) & {name for name, entry in self.search.items() if entry})
        if both:
            raise ValueError(f"{', '.join(both)} has a fixed value and a search range; keep one")
        return self


class PrunePlan(StrictModel):
    """When a trial of the search is given up before its last epoch: its best dev score so far is below a floor.

    The floors of a trial come from the points of earlier rounds alone (`sweeps.search.pruning`), so they do not hang on who ran first.
    """

    rule: Literal["median", "asha"]
    min_epochs: int = Field(5, ge=1, description="every trial runs at least so long; the first rung of asha")
    reduction_factor: int = Field(3, ge=2, description="asha: the rungs' ratio, and 1 in so many goes on at each")
    min_points: int = Field(4, ge=1, description="earlier points that must have come to an epoch before it has a floor")


class SearchPlan(StrictModel):
    """How hyper-parameters are searched, with the same budget in every cell.

    `n_trials` points are tried in each cell, each with every one of `seeds`; a space that holds fewer is tried in full. They are
    asked for in rounds of `round_size`: a round's points depend on the plan and on earlier rounds, so a larger round runs wider
    and learns less. The samplers are described in `sweeps.search.optuna_search`.
    """

    n_trials: int = Field(8, ge=1, description="points in each cell")
    seeds: tuple[int, ...] = Field((100, 101), min_length=1)
    sampler: Literal["tpe", "random", "grid", "gp"] = "tpe"
    round_size: int = Field(4, ge=1, description="points that are tried at the same time")
    seed: int = 0
    prune: PrunePlan | None = Field(None, description="null: no point is given up")

    @field_validator("sampler", mode="before")
    @classmethod
    def _without_cmaes(cls, sampler: Any) -> Any:
        if sampler == "cmaes":
            raise ValueError("cmaes is not supported any more; use gp, Optuna's Gaussian process, or tpe")
        return sampler


class ReportPlan(StrictModel):
    """The seeds whose results are reported. Five cannot reach p < .05 in a Wilcoxon test.

    With `vary: [data]` the examples alone differ from trial to trial, and the order, initialisation and dropout stay those of the
    first seed; plans that vary one thing each tell where the spread comes from. A method gets one trial where nothing that varies
    can change its answer.
    """

    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4, 5), min_length=1)
    vary: tuple[SeedName, ...] = Field(SEED_NAMES, min_length=1)


class ForgettingPlan(StrictModel):
    """What the reported trials also measure, with the base model and with the adapted one."""

    tasks: tuple[str, ...] = Field((), description="tasks of llmft, zero-shot on their in-domain set")
    harness: tuple[str, ...] = Field((), description="tasks of lm-evaluation-harness (llmft[harness])")
    harness_dir: str | None = Field(None, description="a folder with further tasks in the harness's format")
    text: str | None = Field(None, description="a text file whose perplexity is measured")
    limit: int | None = Field(None, ge=1, description="examples of each task; null: all")


class Plan(StrictModel):
    """Every model on every task with every method and number of shots, under the same conditions."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = Field(min_length=1, description="names, and tasks of your own (llmft.config.custom_task)")
    data_dir: str | None = Field(None, description="a local folder with the tasks' files; null: the hub")
    n_shots: tuple[int, ...] = Field((16,), min_length=1)
    shots_unit: Literal["total", "per_class"] = "total"
    draw: Literal["balanced", "random"] = "balanced"
    demonstrations: tuple[str, ...] = Field((), description="ids of the shots, or a JSON file with them, in place of a draw")
    pattern: str | None = Field(None, description="null: each task's first")
    verbalizer: str = "default"
    instruction: str = Field("", description="text that opens every prompt")
    separator: str = Field("\n\n", description="stands between the instruction, the demonstrations and the query")
    methods: dict[str, MethodEntry] = Field(min_length=1)
    train: dict[str, Any] = Field(default_factory=dict, description="fields of TrainSpec, for every method")
    generation: dict[str, Any] = Field(default_factory=dict, description="fields of GenerationSpec, for tasks that generate text")
    search: SearchPlan | None = Field(None, description="null: every method runs with its defaults")
    report: ReportPlan = ReportPlan()
    forgetting: ForgettingPlan | None = Field(None, description="null: only the plan's tasks are measured")
    n_dev: int = Field(
        64, ge=0, description="in total; as many of each label as can be: 13 over three labels are 5, 4 and 4. 0: no dev set"
    )
    n_test: int | None = Field(None, ge=1)
    test_sets: tuple[str, ...] | None = Field(None, min_length=1, description="null: all; a task takes those that are its own")
    max_length: int | None = Field(None, ge=8)
    selections: tuple[Selection, ...] = Field(("last", "best_dev"), min_length=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    trial_timeout_s: float | None = Field(None, gt=0, description="a trial that takes longer fails; null: no limit")
    keep_weights: bool = Field(False, description="keep what the reported trials have trained (adapters, or whole models)")
    device_memory: float | None = Field(None, gt=0, description="GiB of each GPU; null: what the device or its type says")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        models = [(entry.name, entry.revision) for entry in self.models]
        if own := [task.name for task in self.tasks if isinstance(task, CustomTask) and task.name in TASKS]:
            raise ValueError(f"tasks: {own[0]!r} is the name of a task that comes with llmft; give yours another")
        lists = {"models": models, "tasks": self.task_names, "n_shots": self.n_shots, "report.seeds": self.report.seeds}
        if self.search:
            lists["search.seeds"] = self.search.seeds
            if both := sorted(set(self.search.seeds) & set(self.report.seeds)):
                raise ValueError(f"search.seeds and report.seeds share {both}; a search must not see what is reported")
            if self.n_dev == 0:
                raise ValueError("search needs dev examples: set n_dev above 0, or search to null")
        elif "search" not in self.model_fields_set:
            for name, entry in self.methods.items():
                if any(entry.search.values()):
                    raise ValueError(
                        f"methods.{name}.search gives ranges, and the plan has no search; add search: {{n_trials: 4, "
                        "seeds: [100, 101]}, or search: null to run without one"
                    )
        for name, values in lists.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice")
        if self.forgetting and any(entry.in_group for entry in self.models):
            raise ValueError(
                "forgetting is measured by one process, and a model has several; remove it, set keep_weights to true and use "
                "llmft evaluate afterwards"
            )
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task if isinstance(task, str) else task.name for task in self.tasks)

    @property
    def search_selection(self) -> Selection:
        """The checkpoint that the search looks at: best on dev where the plan keeps it, else the last."""
        return "best_dev" if "best_dev" in self.selections else "last"

    @property
    def oracles(self) -> tuple[Selection, ...]:
        """The plan's selections that look at the reported sets."""
        return tuple(name for name in self.selections if name in ORACLES)
