"""What a task is: labelled text, its patterns and label words, and where its test sets come from. Each file in `tasks/` holds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from types import MappingProxyType

import numpy as np

from llmft.errors import UserError
from llmft.prompts import Pattern
from llmft.seeds import stream
from llmft.spec import DataRef

NO_LABEL = -1


@dataclass(frozen=True)
class Example:
    """One labelled text.

    `fields` are the texts that a pattern names, `label` an index into the task's labels (`NO_LABEL` where it must not be known),
    `groups` what results are also reported by (heuristic, subcase).
    """

    id: str
    fields: Mapping[str, str]
    label: int
    groups: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class TestSet:
    """A reported set. `domain` is "in" or "out"."""

    name: str
    domain: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class TaskData:
    """A task's rows: the pool that shots and dev come from, and the reported sets. `revision` says which copy it is."""

    pool: tuple[Example, ...]
    tests: tuple[TestSet, ...]
    revision: str = ""

    @cached_property
    def pool_by_label(self) -> dict[int, list[Example]]:
        by_label: dict[int, list[Example]] = {}
        for example in self.pool:
            by_label.setdefault(example.label, []).append(example)
        return by_label


@dataclass(frozen=True)
class Draw:
    """The examples of one trial, in a random order; no two of the parts have one in common.

    The labels of `unlabelled` are `NO_LABEL`, so that nothing can read them.
    """

    shots: tuple[Example, ...]
    dev: tuple[Example, ...]
    unlabelled: tuple[Example, ...] = ()


class Task:
    """A classification task. Subclasses give the class attributes and `load`.

    Class attributes:
        labels: names of the labels, in the order of their indices.
        patterns: name -> `Pattern`.
        verbalizers: name -> one word per label. "default" stands for the one that the pattern names.
        in_domain, out_of_domain: names of the test sets; the first of `out_of_domain` is the headline number.
        needs_data: whether `load` reads files or the hub.
    """

    labels: tuple[str, ...]
    patterns: Mapping[str, Pattern]
    verbalizers: Mapping[str, tuple[str, ...]]
    in_domain: str
    out_of_domain: tuple[str, ...] = ()
    needs_data: bool = True

    def resolve_data(self, directory: str | None) -> DataRef:
        """Where the rows come from, with a fingerprint of their contents.

        Args:
            directory: a local folder, or None for the hub.

        Raises:
            UserError: the folder lacks a file, or is not there.
        """
        raise NotImplementedError

    def load(self, data: DataRef) -> TaskData:
        """Every row.

        Raises:
            UserError: a file is missing or damaged, a label is not one of the task's, the hub cannot be reached.
        """
        raise NotImplementedError


def per_label(n_shots: int, unit: str, n_labels: int, where: str = "n_shots") -> int:
    """How many examples of each label `n_shots` means.

    Raises:
        UserError: `n_shots` in total cannot be balanced over the labels.
    """
    if unit == "per_class":
        return n_shots
    if n_shots % n_labels:
        lower, upper = n_shots - n_shots % n_labels, n_shots - n_shots % n_labels + n_labels
        raise UserError(
            f"{where}: {n_shots} shots in total cannot be balanced over {n_labels} labels. "
            f"Use {lower or upper} or {upper if lower else upper + n_labels}, or shots_unit: per_class."
        )
    return n_shots // n_labels


def draw_examples(
    data: TaskData, n_labels: int, n_shots: int, unit: str, n_dev: int, seed: int, n_unlabelled: int = 0
) -> Draw:
    """Draw shots and dev, balanced over the labels, and unlabelled examples of the rest, as they come.

    Each label's pool is put in a random order that depends on `seed` alone; shots come from its front and dev from its back.
    So the same seed gives every method the same examples, fewer shots are a subset of more, and dev does not change with the
    number of shots. The unlabelled come from a random order of the whole pool, without what was drawn as shots or dev: the same
    for every method, and fewer are the first of more.

    Raises:
        UserError: the pool has too few examples, in all or of a label.
    """
    k_shots = per_label(n_shots, unit, n_labels)
    k_dev = [n_dev // n_labels + (label < n_dev % n_labels) for label in range(n_labels)]
    shots, dev = [], []
    for label in range(n_labels):
        rows = data.pool_by_label.get(label, [])
        if k_shots + k_dev[label] > len(rows):
            raise UserError(
                f"n_shots: {k_shots} shots and {k_dev[label]} dev examples of label {label} are more than the "
                f"{len(rows)} that the training pool holds. Use fewer shots or a smaller n_dev."
            )
        order = stream(seed, f"pool/{label}").permutation(len(rows))
        shots.append([rows[i] for i in order[:k_shots]])
        dev.append([rows[i] for i in order[len(rows) - k_dev[label] :]])
    interleaved = tuple(example for group in zip(*shots, strict=True) for example in group)  # any prefix stays balanced
    held_out = tuple(example for group in dev for example in group)
    return Draw(interleaved, held_out, _draw_unlabelled(data, {example.id for example in interleaved + held_out}, n_unlabelled, seed))


def _draw_unlabelled(data: TaskData, drawn: set[str], n: int, seed: int) -> tuple[Example, ...]:
    """`n` examples of the pool, their labels taken away; none whose id is among `drawn`."""
    if n > (n_left := len(data.pool) - len(drawn)):
        raise UserError(f"n_unlabelled: {n} are more than the {n_left} examples of the training pool that are neither shots nor dev.")
    order = stream(seed, "unlabelled").permutation(len(data.pool)) if n else ()
    free = (data.pool[i] for i in order if data.pool[i].id not in drawn)
    return tuple(replace(example, label=NO_LABEL) for example in islice(free, n))


def subsample(test: TestSet, n: int | None, seed: int = 123) -> TestSet:
    """`n` rows of a test set, in equal parts of every label and group; the same rows for every trial. None: all rows."""
    if n is None or n >= len(test.examples):
        return test
    strata: dict[tuple, list[int]] = {}
    for index, example in enumerate(test.examples):
        strata.setdefault((example.label, *sorted(example.groups.items())), []).append(index)
    generator = stream(seed, f"subsample/{test.name}")
    queues = [[rows[i] for i in generator.permutation(len(rows))] for rows in strata.values()]
    chosen: list[int] = []
    while len(chosen) < n:  # one from each stratum in turn, until there are enough
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop())
    return TestSet(test.name, test.domain, tuple(test.examples[i] for i in sorted(np.asarray(chosen).tolist())))
