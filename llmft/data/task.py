"""What a task is: labelled text or text to be generated, its patterns, and where its test sets come from.

Each file in `tasks/` holds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmft.config import DataRef, GenerationSpec, Pattern

if TYPE_CHECKING:
    from llmft.data.sources import Source


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
    """A task's rows.

    Attributes:
        pool: the training pool, from which shots are drawn, and dev examples unless there is a `dev_pool`.
        tests: the reported sets.
        revision: which copy of the data it is.
        locations: id -> file and line, for the examples of the pool with a rare label.
    """

    pool: tuple[Example, ...]
    tests: tuple[TestSet, ...]
    revision: str = ""
    dev_pool: tuple[Example, ...] = ()
    locations: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

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


Kind = Literal["classification", "generation"]


class Task:
    """A classification task. Subclasses give the class attributes and `load`, and `resolve_data` if they read no `sources`.

    Class attributes:
        kind: what an answer is; a method says which kinds it serves (`llmft.methods._base.Method.kinds`).
        labels: names of the labels, in the order of their indices.
        patterns: name -> `Pattern`.
        verbalizers: name -> one word per label. "default" stands for the one that the pattern names.
        in_domain, out_of_domain: names of the test sets; the first of `out_of_domain` is the headline number.
        needs_data: whether `load` reads files or the hub.
        sources: the tables that `load` reads.
    """

    kind: Kind = "classification"
    metric: str  # of a task that generates text; a user's own may be of either kind
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
        from llmft.data.sources import resolve_sources

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
        metric: the name of the score that comparisons are about, one of `llmft.config.custom_task.EXAMPLE_METRICS`.
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
