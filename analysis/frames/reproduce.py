"""Write the command that runs a trial again, from its spec."""

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
_SAID = {"model", "teacher", "mixture", "task", "definition", "data", "method", "settings", "n_shots", "train", *_SEEDS, *_OPTIONS}
_SAID |= {"forgetting"}  # measured beside the task: the numbers of the cell do not depend on it


def trial_command(spec: TrialSpec) -> str | None:
    """Write the command `llmft trial ...` that runs this trial again; None where the command line cannot express the trial.

    That is a method of another llmft, a trial of the search, three different seeds, a task that the plan defines (also in a
    mixture), and a teacher of another revision than main.
    """
    seeds = Counter(getattr(spec, name) for name in reversed(_SEEDS)).most_common()  # what varied comes last
    if not _expressible(spec) or len(seeds) > 2:
        return None
    parts = ["llmft", "trial", *_named_options(spec, seeds[-1][0])]
    settings = dict(spec.settings) | _train_settings(spec) | _plan_settings(spec)
    if len(seeds) > 1:
        vary = [name.removesuffix("_seed") for name in _SEEDS if getattr(spec, name) == seeds[-1][0]]
        settings["plan.report"] = {"seeds": [seeds[0][0]], "vary": vary}
    for name, value in settings.items():
        parts += ["--set", f"{name}={json.dumps(value)}"]
    if spec.data.directory:
        parts += ["--data-dir", spec.data.directory]
    return shlex.join(parts)


def _expressible(spec: TrialSpec) -> bool:
    defined = spec.definition or any(other.definition for other in spec.mixture.values())
    other_teacher = spec.teacher is not None and spec.teacher.revision != "main"
    return spec.method in METHODS and spec.test_sets != () and not defined and not other_teacher


def _trains(spec: TrialSpec) -> bool:
    return spec.selections != ("none",)


def _named_options(spec: TrialSpec, seed: int) -> list[str]:
    """The options that have a name of their own, where they differ from the default."""
    parts = ["--task", spec.task, "--method", spec.method, "--model", spec.model.name]
    if spec.model.revision != "main":
        parts += ["--revision", spec.model.revision]
    if spec.n_shots or spec.mixture:
        parts += ["--shots", str(spec.n_shots)]
    if spec.teacher:
        parts += ["--teacher", spec.teacher.name]
    for name in sorted(spec.mixture):
        parts += ["--mixture", name]
    parts += ["--seed", str(seed)]
    for name, option in _TRAIN_OPTIONS.items() if _trains(spec) else ():
        parts += [option, str(getattr(spec.train, name))]
    for name, option in _OPTIONS.items():
        if (value := getattr(spec, name)) != TrialSpec.model_fields[name].default:
            parts += [option, str(value)]
    return parts


def _train_settings(spec: TrialSpec) -> dict[str, Any]:
    """The fields of the training without an option, where they differ from the method's defaults."""
    if not _trains(spec):
        return {}
    usual = TrainSpec(**method_class(spec.method).train_defaults).model_dump(mode="json")
    given = spec.train.model_dump(mode="json", exclude=set(_TRAIN_OPTIONS))
    return {name: value for name, value in given.items() if value != usual[name]}


def _plan_settings(spec: TrialSpec) -> dict[str, Any]:
    """The other fields of the spec, where they differ from the default, as a plan names them."""
    content = spec.model_dump(mode="json")
    names = [name for name, field in TrialSpec.model_fields.items() if name not in _SAID and getattr(spec, name) != field.default]
    return {f"plan.{name}": content[name] for name in names if _trains(spec) or name != "selections"}
