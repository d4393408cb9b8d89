"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llmft.data.task import NO_LABEL, Example, TaskData, TestSet
from llmft.errors import UserError
from llmft.seeds import stream

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Draw:
    """The examples of one trial, in a random order; no two of the parts have one in common.

    The labels of `unlabelled` are `NO_LABEL`, and they have no references, so that nothing can read them.
    """

    shots: tuple[Example, ...]
    dev: tuple[Example, ...]
    unlabelled: tuple[Example, ...] = ()


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
        raise UserError(f"demonstrations: no example of the training pool has the id {missing[0]!r}; one is {data.pool[0].id!r}.")
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
            raise UserError(f"n_dev: {k_dev} examples{of_label} are more than the {len(dev_order)} that dev holds. Use a smaller n_dev.")
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
