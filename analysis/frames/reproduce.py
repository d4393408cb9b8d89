"""The command that runs a trial again, from its spec."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

from llmft.config import TrainSpec, TrialSpec
from llmft.methods import METHODS, method_class
from llmft.seeds import SEED_FIELDS

_TRAIN_OPTIONS = {"learning_rate": "--lr", "epochs": "--epochs"}
_WRITTEN = {"model", "teacher", "mixture", "task", "definition", "data", "method", "settings", "n_shots", "train", *SEED_FIELDS}
"""Fields of a spec that the command gives in words of their own; `--set` has the others. `forgetting` is left out: it is measured beside
the task and does not change the numbers of the cell."""


def trial_command(spec: TrialSpec) -> str | None:
    """Return `llmft trial ...` for a trial.

    None where the command line has no words for it: a method that this version lacks, a trial of the search, three different seeds,
    or a custom task (also in a mixture).
    """
    seeds = Counter(getattr(spec, name) for name in reversed(SEED_FIELDS)).most_common()  # what varied comes last
    custom = spec.definition or any(other.definition for other in spec.mixture.values())
    if spec.method not in METHODS or spec.test_sets == () or custom or len(seeds) > 2:
        return None
    parts = ["llmft", "trial", "--task", spec.task, "--method", spec.method, "--model", spec.model.name]
    if spec.n_shots or spec.mixture:
        parts += ["--shots", str(spec.n_shots)]
    parts += ["--seed", str(seeds[-1][0])]
    if spec.selections != ("none",):
        parts += [text for name, option in _TRAIN_OPTIONS.items() for text in (option, str(getattr(spec.train, name)))]
    assignments = _assignments(spec)
    if len(seeds) > 1:
        vary = [name.removesuffix("_seed") for name in SEED_FIELDS if getattr(spec, name) == seeds[-1][0]]
        assignments["report"] = {"seeds": [seeds[0][0]], "vary": vary}
    for key, value in assignments.items():
        parts += ["--set", f"{key}={json.dumps(value)}"]
    if spec.data.directory:
        parts += ["--data-dir", spec.data.directory]
    return shlex.join(parts)


def _assignments(spec: TrialSpec) -> dict[str, Any]:
    """Return key -> value of everything that differs from the defaults and has no option of its own, in the words of a plan."""
    content = spec.model_dump(mode="json")
    assignments: dict[str, Any] = {} if spec.model.revision == "main" else {"model.revision": spec.model.revision}
    if spec.teacher:
        of_main = spec.teacher.revision == "main"
        assignments |= {"teacher.name": spec.teacher.name} | ({} if of_main else {"teacher.revision": spec.teacher.revision})
    if spec.mixture:
        assignments["mixture"] = sorted(spec.mixture)
    assignments |= {f"settings.{name}": value for name, value in content["settings"].items()}
    trains = spec.selections != ("none",)
    if trains:
        usual = TrainSpec(**method_class(spec.method).train_defaults).model_dump(mode="json")
        given = spec.train.model_dump(mode="json", exclude=set(_TRAIN_OPTIONS))
        assignments |= {f"train.{name}": value for name, value in given.items() if value != usual[name]}
    for name, field in TrialSpec.model_fields.items():
        if name not in _WRITTEN | {"forgetting"} and getattr(spec, name) != field.default and (trains or name != "selections"):
            assignments[name] = content[name]
    return assignments
