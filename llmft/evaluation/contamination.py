"""Models whose training is known to hold a task: what they score there is not what a model scores that never saw it.

Only what the authors say themselves is listed. A model or a task that is not here is unknown, not clean.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from llmft.records import Finding


@dataclass(frozen=True)
class Mixture:
    """A mixture of tasks that models were trained on.

    Attributes:
        name: what the models are called; with `source` it stands in the message.
        models: a pattern, found in the last part of a model's name, whatever the case.
        datasets: what the mixture holds, of all that it holds; data sets under the names of their tasks here.
        source: where its authors say so.
    """

    name: str
    models: str
    datasets: frozenset[str]
    source: str


GLUE = frozenset({"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"})
SUPER_GLUE = frozenset({"boolq", "cb", "copa", "multirc", "wic"})
T0_SHARE = frozenset({"commonsense_qa", "samsum", "qqp", "mrpc", "cosmos_qa", "cnn_dailymail", "xsum"})

MIXTURES = (
    Mixture(
        "FLAN-T5 and FLAN-UL2",
        r"flan-(t5|ul2)",
        GLUE | SUPER_GLUE | T0_SHARE | {"anli", "snli"},
        "the Flan collection: Wei et al. 2022, figure 3, and T0's mixture; Chung et al. 2022, section 2.1",
    ),
    Mixture(
        "T5 1.0",
        r"^(t5|lamini-t5)-(small|base|large|3b|11b|\d+m)$",  # LaMini-T5 was tuned from it
        GLUE | SUPER_GLUE | {"cnn_dailymail"},
        "its multi-task pre-training: Raffel et al. 2020, section 3.7, and the model's card",
    ),
    Mixture(
        "T0",
        r"^t0(p|pp|_3b|_single_prompt|_original_task_only)?$",
        T0_SHARE,
        "P3: Sanh et al. 2022, figure 2, and the model's card",
    ),
)


def contamination_findings(models: Iterable[str | None], sets: Collection[str]) -> list[Finding]:
    """A warning for each data set that a mixture of the model's is known to hold.

    Args:
        models: the model's name, and that of the model it was tuned from.
        sets: names of the task and its test sets. `mnli_3way` is of the data set `mnli`.
    """
    last_parts = [name.rsplit("/", 1)[-1] for name in models if name]
    found = []
    for mixture in MIXTURES:
        if not any(re.search(mixture.models, part, re.IGNORECASE) for part in last_parts):
            continue
        held = {dataset for dataset in mixture.datasets for name in sets if name == dataset or name.startswith(f"{dataset}_")}
        for dataset in sorted(held):
            message = f"the training of {mixture.name} held {dataset} ({mixture.source}), so that it is no unseen task for the model"
            found.append(Finding(code="known_training_task", severity="warning", message=message))
    return found
