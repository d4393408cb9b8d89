"""Draws: which examples of a task are the shots, the dev examples, the unlabelled examples and the rows of a test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmft.data.task import NO_LABEL, Example, TaskData, TestSet
from llmft.errors import UserError
from llmft.seeds import stream


@dataclass(frozen=True)
class Draw:
    """The examples of one trial, in a random order; no two of the parts have one in common.

    The labels of `unlabelled` are `NO_LABEL`, and they have no references, so that nothing can read them.
    """

    shots: tuple[Example, ...]
    dev: tuple[Example, ...]
    unlabelled: tuple[Example, ...] = ()


def per_label(n_shots: int, unit: str, n_labels: int, where: str = "n_shots") -> int:
    """Convert `n_shots` to a number of examples per label; without labels, in total.

    Raises:
        UserError: a total that cannot be balanced over the labels, or a number per label where there are none.
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


@dataclass(frozen=True)
class DrawRequest:
    """Which examples a trial asks for; the fields are those of `TrialSpec`.

    Attributes:
        n_shots, unit: number of shots, in "total" or "per_class".
        n_dev: number of dev examples, balanced over the labels as far as possible.
        seed: of every random order.
        kind: "balanced", or "random": shots have the shares of the labels in the pool.
        fixed: ids of examples of the pool that are the shots, whatever the seed.
    """

    n_shots: int
    unit: str
    n_dev: int
    seed: int
    kind: str = "balanced"
    fixed: tuple[str, ...] = ()


def draw_examples(data: TaskData, labels: Sequence[str], request: DrawRequest) -> Draw:
    """Draw shots and dev examples from the training pool.

    The examples of each label are put in a random order that depends on the seed alone; shots come from its front, dev examples from
    its back. So the same seed gives every method the same examples, fewer shots are a subset of more, and dev does not change with
    the number of shots.

    Args:
        labels: names of the task's labels; empty for a task of texts, whose pool is drawn from as a whole.

    Raises:
        UserError: the pool has too few examples of a label, or none with a `fixed` id.
    """
    fixed = _examples_by_id(data, request.fixed)
    balanced = request.kind == "balanced" and not fixed
    n_shots = per_label(request.n_shots, request.unit, len(labels)) if balanced else 0
    shots_by_label: list[list[Example]] = []
    dev: list[Example] = []
    n_groups = len(labels) or 1
    for position in range(n_groups):
        n_dev = request.n_dev // n_groups + (position < request.n_dev % n_groups)
        label = position if labels else None
        named = f" of label {labels[position]!r}" if labels else ""
        shots_of_label, dev_of_label = _draw_label(data, label, n_shots, n_dev, request, named)
        shots_by_label.append(shots_of_label)
        dev += dev_of_label
    if fixed:
        return Draw(fixed, tuple(dev))
    if balanced:  # interleaved: any prefix stays balanced
        return Draw(tuple(example for group in zip(*shots_by_label, strict=True) for example in group), tuple(dev))
    return Draw(_draw_at_random(data, dev, request), tuple(dev))


def _examples_by_id(data: TaskData, ids: Sequence[str]) -> tuple[Example, ...]:
    by_id = {example.id: example for example in data.pool} if ids else {}
    if missing := [id_ for id_ in ids if id_ not in by_id]:
        raise UserError(f"demonstrations: no example of the training pool has the id {missing[0]!r}; one is {data.pool[0].id!r}.")
    return tuple(by_id[id_] for id_ in ids)


def _draw_label(
    data: TaskData, label: int | None, n_shots: int, n_dev: int, request: DrawRequest, named: str
) -> tuple[list[Example], list[Example]]:
    """Draw shots and dev examples of one label; `named` says in messages which it is."""
    rows = [example for example in data.pool_by_label.get(label, []) if example.id not in request.fixed]
    order = _shuffled(rows, request.seed, f"pool/{label}")
    n_dev_of_pool = 0 if data.dev_pool else n_dev
    if len(order) < n_shots + n_dev_of_pool:
        raise _too_few(n_shots, n_dev_of_pool, named, rows, data.locations)
    dev_order = _shuffled(data.dev_pool_by_label.get(label, []), request.seed, f"dev/{label}") if data.dev_pool else order
    if len(dev_order) < n_dev:
        raise UserError(f"n_dev: {n_dev} examples{named} are more than the {len(dev_order)} that dev holds. Use a smaller n_dev.")
    return order[:n_shots], dev_order[len(dev_order) - n_dev :]


def _draw_at_random(data: TaskData, dev: Sequence[Example], request: DrawRequest) -> tuple[Example, ...]:
    """Draw shots from the whole pool without the dev examples, whatever their labels."""
    held_out = {example.id for example in dev}
    rest = [example for example in data.pool if example.id not in held_out]
    if request.n_shots > len(rest):
        raise UserError(f"n_shots: {request.n_shots} are more than the {len(rest)} examples that the training pool holds beside dev.")
    return tuple(_shuffled(rest, request.seed, "pool")[: request.n_shots])


def _too_few(n_shots: int, n_dev: int, named: str, rows: Sequence[Example], locations: Mapping[str, str]) -> UserError:
    requested = {"n_shots": (n_shots, "shots", "fewer shots"), "n_dev": (n_dev, "dev examples", "a smaller n_dev")}
    requested = {key: part for key, part in requested.items() if part[0]}
    asked = " and ".join(f"{n} {what}" for n, what, _ in requested.values())
    advice = " or ".join(fix for *_, fix in requested.values())
    known = [locations[example.id] for example in rows if example.id in locations]
    typo = f" If the label is a typo, correct it: it stands in {', '.join(known)}." if known else ""
    return UserError(
        f"{next(iter(requested))}: {asked}{named} are more than the {len(rows)} that the training pool holds. Use {advice}.{typo}"
    )


def draw_unlabelled(data: TaskData, drawn: Draw, n: int, seed: int) -> Draw:
    """Add `n` other examples of the pool to `drawn`, without their labels, in a random order that depends on `seed` alone.

    They are the same for every method, and fewer are the first of more.

    Raises:
        UserError: the pool has too few.
    """
    taken = {example.id for example in drawn.shots + drawn.dev}
    free = [example for example in _shuffled(data.pool, seed, "unlabelled") if example.id not in taken] if n else []
    if n > len(free):
        raise UserError(f"n_unlabelled: {n} are more than the {len(free)} examples of the training pool that are neither shots nor dev.")
    hidden = None if None in data.pool_by_label else NO_LABEL  # where text is generated there are no labels to hide
    return replace(drawn, unlabelled=tuple(replace(example, label=hidden, references=()) for example in free[:n]))


def _shuffled(rows: Sequence[Example], seed: int, name: str) -> list[Example]:
    return [rows[i] for i in stream(seed, name).permutation(len(rows))]


def subsample(test: TestSet, n: int | None, seed: int = 123) -> TestSet:
    """Take `n` rows of a test set, in equal parts from every label and group; the same for every trial. None: all rows."""
    if n is None or n >= len(test.examples):
        return test
    strata: dict[tuple[Any, ...], list[int]] = {}
    for index, example in enumerate(test.examples):
        strata.setdefault((example.label, *sorted(example.groups.items())), []).append(index)
    generator = stream(seed, f"subsample/{test.name}")
    queues = [[rows[i] for i in generator.permutation(len(rows))] for rows in strata.values()]
    chosen: list[int] = []
    while len(chosen) < n:  # one from each stratum in turn, until there are enough
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop())
    return TestSet(test.name, test.domain, tuple(test.examples[i] for i in sorted(chosen)))
