"""The command that runs a trial again, from its description."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

from llmft.config import TrainSpec, TrialSpec
from llmft.methods import METHODS, method_class

_SEEDS = ("data_seed", "order_seed", "init_seed", "dropout_seed")
_OPTIONS = {"pattern": "--pattern", "verbalizer": "--verbalizer", "n_dev": "--n-dev", "n_test": "--n-test"}
_OPTIONS |= {"max_length": "--max-length", "precision": "--precision"}
_TRAIN_OPTIONS = {"learning_rate": "--lr", "epochs": "--epochs", "batch_size": "--batch-size"}
_TOLD = {"model", "teacher", "mixture", "task", "definition", "data", "method", "settings", "n_shots", "train", *_SEEDS, *_OPTIONS}
_TOLD |= {"forgetting"}  # measured beside the task: the numbers of the cell do not hang on it


def trial_command(spec: TrialSpec) -> str | None:
    """`llmft trial ...` for this trial; None where the command line cannot say it: a method of another llmft, a trial of the
    search, three different seeds, a task that the plan defines (also in a mixture), another branch of a teacher than main."""
    seeds = Counter(getattr(spec, name) for name in reversed(_SEEDS)).most_common()  # what varied comes last
    own = spec.definition or any(other.definition for other in spec.mixture.values())
    other_teacher = spec.teacher is not None and spec.teacher.revision != "main"
    if spec.method not in METHODS or spec.test_sets == () or own or other_teacher or len(seeds) > 2:
        return None
    parts = ["llmft", "trial", "--task", spec.task, "--method", spec.method, "--model", spec.model.name]
    if spec.model.revision != "main":
        parts += ["--revision", spec.model.revision]
    if spec.n_shots or spec.mixture:
        parts += ["--shots", str(spec.n_shots)]
    if spec.teacher:
        parts += ["--teacher", spec.teacher.name]
    for name in sorted(spec.mixture):
        parts += ["--mixture", name]
    parts += ["--seed", str(seeds[-1][0])]
    trains = spec.selections != ("none",)
    if trains:
        for name, option in _TRAIN_OPTIONS.items():
            parts += [option, str(getattr(spec.train, name))]
    defaults = TrialSpec.model_fields
    for name, option in _OPTIONS.items():
        if (value := getattr(spec, name)) != defaults[name].default:
            parts += [option, str(value)]
    others: dict[str, Any] = dict(spec.settings)
    if trains:
        usual = TrainSpec(**method_class(spec.method).train_defaults).model_dump(mode="json")
        given = spec.train.model_dump(mode="json", exclude=set(_TRAIN_OPTIONS))
        others |= {name: value for name, value in given.items() if value != usual[name]}
    content = spec.model_dump(mode="json")
    for name, field in defaults.items():
        if name not in _TOLD and getattr(spec, name) != field.default and (trains or name != "selections"):
            others[f"plan.{name}"] = content[name]
    if len(seeds) > 1:
        vary = [name.removesuffix("_seed") for name in _SEEDS if getattr(spec, name) == seeds[-1][0]]
        others["plan.report"] = {"seeds": [seeds[0][0]], "vary": vary}
    for name, value in others.items():
        parts += ["--set", f"{name}={json.dumps(value)}"]
    if spec.data.directory:
        parts += ["--data-dir", spec.data.directory]
    return shlex.join(parts)
