"""What a task is: labelled text or text to be generated, its patterns, and where its test sets come from.

Each file in `tasks/` holds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmft.errors import UserError
from llmft.prompts import Pattern
from llmft.seeds import stream
from llmft.spec import DataRef, GenerationSpec

if TYPE_CHECKING:
    from llmft.sources import Source

NO_LABEL = -1


@dataclass(frozen=True)
class Example:
    """One labelled text, or one with the texts that a model should generate for it.

    `fields` are the texts that a pattern names, `label` an index into the task's labels (`NO_LABEL` where it must not be known, None
    where text is generated), `groups` what results are also reported by (heuristic, subcase), `references` the texts that count as
    right: the first is shown and trained on. `rationale` says why the label is right; only demonstrations show it.
    """

    id: str
    fields: Mapping[str, str]
    label: int | None
    groups: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    references: tuple[str, ...] = ()
    rationale: str = ""


@dataclass(frozen=True)
class TestSet:
    """A reported set. `domain` is "in" or "out"."""

    name: str
    domain: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class TaskData:
    """A task's rows: the pool that shots and dev come from, and the reported sets. `revision` says which copy it is.

    `dev_pool` is where dev comes from if the task keeps examples apart for it; empty: from `pool`. `places` says of the pool's
    examples with a rare label in which line of the user's file each stands, by id.
    """

    pool: tuple[Example, ...]
    tests: tuple[TestSet, ...]
    revision: str = ""
    dev_pool: tuple[Example, ...] = ()
    places: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @cached_property
    def pool_by_label(self) -> dict[int | None, list[Example]]:
        return _by_label(self.pool)

    @cached_property
    def dev_pool_by_label(self) -> dict[int | None, list[Example]]:
        return _by_label(self.dev_pool) if self.dev_pool else self.pool_by_label


def _by_label(examples: Iterable[Example]) -> dict[int | None, list[Example]]:
    by_label: dict[int | None, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    return by_label


@dataclass(frozen=True)
class Draw:
    """The examples of one trial, in a random order; no two of the parts have one in common.

    The labels of `unlabelled` are `NO_LABEL`, and they have no references, so that nothing can read them.
    """

    shots: tuple[Example, ...]
    dev: tuple[Example, ...]
    unlabelled: tuple[Example, ...] = ()


Kind = Literal["classification", "generation"]


class Task:
    """A classification task. Subclasses give the class attributes and `load`, and `resolve_data` if they read no `sources`.

    Class attributes:
        kind: what an answer is; a method says which kinds it serves (`llmft.method.Method.kinds`).
        labels: names of the labels, in the order of their indices.
        patterns: name -> `Pattern`.
        verbalizers: name -> one word per label. "default" stands for the one that the pattern names.
        in_domain, out_of_domain: names of the test sets; the first of `out_of_domain` is the headline number.
        needs_data: whether `load` reads files or the hub.
        sources: the tables that `load` reads.
    """

    kind: ClassVar[Kind] = "classification"
    labels: tuple[str, ...]
    patterns: Mapping[str, Pattern]
    verbalizers: Mapping[str, tuple[str, ...]]
    in_domain: str
    out_of_domain: tuple[str, ...] = ()
    needs_data: bool = True
    sources: tuple[Source, ...] = ()

    @property
    def generation(self) -> GenerationSpec | None:
        """How its texts are generated unless a plan says otherwise; None for classification."""
        return None

    def resolve_data(self, directory: str | None) -> DataRef:
        """Where the rows come from, with a fingerprint of their contents.

        Args:
            directory: a local folder, or None for the hub.

        Raises:
            UserError: the folder lacks a file, or is not there.
        """
        from llmft.sources import resolve_sources

        return resolve_sources(self.sources, directory)

    def load(self, data: DataRef) -> TaskData:
        """Every row.

        Raises:
            UserError: a file is missing or damaged, a label is not one of the task's, the hub cannot be reached.
        """
        raise NotImplementedError


class GenerationTask(Task):
    """A task whose answers are texts.

    Class attributes:
        metric: the name of the score that comparisons are about, one of `llmft.text_metrics.EXAMPLE_METRICS`.
        generation_defaults: fields of `GenerationSpec` whose default this task changes.
    """

    kind = "generation"
    labels = ()
    verbalizers: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    metric: str
    generation_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def generation(self) -> GenerationSpec:
        return GenerationSpec(**self.generation_defaults)


def per_label(n_shots: int, unit: str, n_labels: int, where: str = "n_shots") -> int:
    """How many examples of each label `n_shots` means; without labels, how many in all.

    Raises:
        UserError: `n_shots` in total cannot be balanced over the labels, or is meant for each of none.
    """
    if not n_labels:
        if unit == "per_class":
            raise UserError("shots_unit: per_class is for tasks with labels, and this one generates text. Use total.")
        return n_shots
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
    data: TaskData,
    n_labels: int,
    n_shots: int,
    unit: str,
    n_dev: int,
    seed: int,
    kind: str = "balanced",
    fixed: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Draw:
    """Draw shots and dev. Dev is balanced over the labels; where there are none (`n_labels` 0), all come from the pool as a whole.

    Each label's pool is put in a random order that depends on `seed` alone; shots come from its front and dev from its back.
    So the same seed gives every method the same examples, fewer shots are a subset of more, and dev does not change with the
    number of shots.

    Args:
        kind: "balanced", or "random": shots come from the whole pool but dev, with its shares of the labels.
        fixed: ids of examples of the pool that are the shots instead, whatever the seed.
        names: of the labels, for messages; empty: their indices.

    Raises:
        UserError: the pool has too few examples of a label, or none with such an id.
    """
    wanted = frozenset(fixed)
    named = {example.id: example for example in data.pool if example.id in wanted}
    if missing := [name for name in fixed if name not in named]:
        raise UserError(
            f"demonstrations: no example of the training pool has the id {missing[0]!r}; one is {data.pool[0].id!r}."
        )
    k_shots = per_label(n_shots, unit, n_labels) if kind == "balanced" and not fixed else 0
    labels = range(n_labels) if n_labels else (None,)
    balanced, dev = [], []
    for place, label in enumerate(labels):
        k_dev = n_dev // len(labels) + (place < n_dev % len(labels))
        of_label = "" if label is None else f" of label {names[label]!r}" if names else f" of label {label}"
        rows = [row for row in data.pool_by_label.get(label, []) if row.id not in named]
        order = _shuffled(rows, seed, f"pool/{label}")
        dev_order = _shuffled(data.dev_pool_by_label.get(label, []), seed, f"dev/{label}") if data.dev_pool else order
        if len(order) < k_shots + (0 if data.dev_pool else k_dev):
            raise _too_few(k_shots, 0 if data.dev_pool else k_dev, of_label, rows, data.places)
        if len(dev_order) < k_dev:
            raise UserError(
                f"n_dev: {k_dev} examples{of_label} are more than the {len(dev_order)} that dev holds. Use a smaller n_dev."
            )
        balanced.append(order[:k_shots])
        dev += dev_order[len(dev_order) - k_dev :]
    if fixed:
        return Draw(tuple(named[name] for name in fixed), tuple(dev))
    if kind == "balanced":  # interleaved: any prefix stays balanced
        return Draw(tuple(example for group in zip(*balanced, strict=True) for example in group), tuple(dev))
    apart = {example.id for example in dev}
    rest = [row for row in data.pool if row.id not in apart]
    if n_shots > len(rest):
        raise UserError(f"n_shots: {n_shots} are more than the {len(rest)} examples that the training pool holds beside dev.")
    return Draw(tuple(_shuffled(rest, seed, "pool")[:n_shots]), tuple(dev))


def _too_few(k_shots: int, k_dev: int, of_label: str, rows: Sequence[Example], places: Mapping[str, str]) -> UserError:
    wanted = {"n_shots": (k_shots, "shots", "fewer shots"), "n_dev": (k_dev, "dev examples", "a smaller n_dev")}
    wanted = {key: each for key, each in wanted.items() if each[0]}
    asked, advice = " and ".join(f"{n} {what}" for n, what, _ in wanted.values()), " or ".join(fix for *_, fix in wanted.values())
    known = [places[row.id] for row in rows if row.id in places]
    typo = f" If the label is a typo, correct it: it stands in {', '.join(known)}." if known else ""
    return UserError(
        f"{next(iter(wanted))}: {asked}{of_label} are more than the {len(rows)} that the training pool holds. Use {advice}.{typo}"
    )


def draw_unlabelled(data: TaskData, drawn: Draw, n: int, seed: int) -> Draw:
    """`drawn` and `n` other examples of the pool, their labels taken away, as they come in an order that depends on `seed` alone.

    They are the same for every method, and fewer are the first of more.

    Raises:
        UserError: the pool has too few.
    """
    taken = {example.id for example in drawn.shots + drawn.dev}
    free = [data.pool[i] for i in stream(seed, "unlabelled").permutation(len(data.pool)) if data.pool[i].id not in taken] if n else []
    if n > len(free):
        raise UserError(f"n_unlabelled: {n} are more than the {len(free)} examples of the training pool that are neither shots nor dev.")
    hidden = None if None in data.pool_by_label else NO_LABEL  # where text is generated there are no labels to hide
    return replace(drawn, unlabelled=tuple(replace(example, label=hidden, references=()) for example in free[:n]))


def _shuffled(rows: Sequence[Example], seed: int, name: str) -> list[Example]:
    return [rows[i] for i in stream(seed, name).permutation(len(rows))]


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
