"""What a cell searches: its method's ranges, as the plan changes them, with conditions that can hold and values that are allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import numpy as np

from llmft.config import TrainSpec
from llmft.errors import UserError, unknown_name
from llmft.methods import Method, SearchRange

if TYPE_CHECKING:
    from sweeps.planning.schema import MethodEntry, Plan

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def values_of(train: TrainSpec, settings: Params) -> Params:
    """Every hyper-parameter's value; a setting of the method goes before a training field of that name."""
    return {**train.model_dump(mode="json"), **settings}


def ranges_of(where: str, plan: Plan, entry: MethodEntry, cls: type[Method], values: Params) -> dict[str, SearchRange]:
    """What a cell searches; `values` are those of all hyper-parameters when nothing is searched.

    Raises:
        UserError: the plan's entry names what there is not, or a condition that never holds.
    """
    fixed = {*plan.train, *entry.train, *entry.settings}
    ranges = {name: span for name, span in cls.search.items() if name not in fixed}
    for name, span in entry.search.items():
        if name not in values:
            raise unknown_name("hyper-parameter", name, values, f"{where}.search")
        if span and span.levels and plan.search.sampler != "grid":
            raise UserError(f"{where}.search.{name}.levels: is for sampler: grid; the plan's search has {plan.search.sampler}.")
        ranges.pop(name, None)
        if span is not None:
            ranges[name] = SearchRange(**span.model_dump())
    return _settle_conditions(f"{where}.search", ranges, values, entry.search)


def _settle_conditions(where: str, ranges: Mapping[str, SearchRange], values: Params, asked: Collection[str]) -> dict[str, SearchRange]:
    """`ranges` by name, with conditions on searched hyper-parameters alone: what is fixed has been looked at.

    Where a condition never holds, a range of the method's own is left out, and one that the plan asks for is a mistake.
    """
    settled: dict[str, SearchRange] = {}
    try:
        names = ordered(ranges)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name in names:
        never, when = None, {}
        for other, wanted in ranges[name].when.items():
            if other not in values:
                raise unknown_name("hyper-parameter", other, values, f"{where}.{name}.when")
            if other in settled:
                when[other] = wanted
                possible = any(can_be(settled[other], value) for value in wanted)
            else:
                possible = other not in ranges and among(values[other], wanted)
            if not possible:
                never = f"{where}.{name}.when: never holds, for {other} is never {' or '.join(map(repr, wanted))}."
        if never is None:
            settled[name] = replace(ranges[name], when=when)
        elif name in asked:
            raise UserError(never)
    return dict(sorted(settled.items()))


Params = dict[str, Any]
"""Values of searched hyper-parameters, by the name of a method's setting or of a `TrainSpec` field. One whose condition does not
hold is absent."""

_ELSE = object()
"""Stands for every value that no condition names."""


class Space:
    """Ranges and their conditions.

    Args:
        ranges: by hyper-parameter; a condition may only name another of them.

    Raises:
        UserError: conditions go round in a circle, or one can never hold.
    """

    def __init__(self, ranges: Mapping[str, SearchRange]):
        self.ranges = {name: ranges[name] for name in ordered(ranges)}
        self._parents = {other for span in ranges.values() for other in span.when}
        self._check_conditions()

    def active(self, name: str, params: Params) -> bool:
        """Whether the condition of `name` holds, given the hyper-parameters that stand before it."""
        when = self.ranges[name].when
        return all(other in params and among(params[other], values) for other, values in when.items())

    def points(self, values: Mapping[str, Sequence[Any]]) -> list[Params]:
        """Every combination of `values`, the last hyper-parameter changing fastest; only active ones, and none twice."""
        points: list[Params] = [{}]
        for name in filter(values.__contains__, self.ranges):
            points = [
                longer
                for point in points
                for longer in ([{**point, name: value} for value in values[name]] if self.active(name, point) else [point])
            ]
        return points

    def count(self, values: Mapping[str, Sequence[Any]]) -> int:
        """How many `points` there are, without making them."""
        free = [name for name in values if name not in self._parents]
        return sum(
            math.prod(len(values[name]) for name in free if self.active(name, point))
            for point in self.points({name: values[name] for name in self._parents})
        )

    @property
    def size(self) -> float:
        """How many points there are; infinite if a range is continuous."""
        if not all(span.choices or span.integer for span in self.ranges.values()):
            return math.inf
        return self.count({name: span.choices or _whole(span) for name, span in self.ranges.items()})

    def holds(self, params: Params) -> bool:
        """Whether each of `params` lies in its range."""
        return all(_holds(self.ranges[name], value) for name, value in params.items())

    def restrict(self, values: Params) -> Params:
        """Those of `values` that are active, in the space's order."""
        point: Params = {}
        for name in self.ranges:
            if self.active(name, point):
                point[name] = values[name]
        return point

    def grid(self, n_points: int) -> list[Params]:
        """At most `n_points` points: choices in full, ranges evenly from `low` to `high` (in the logarithm where `log`).

        A range without `levels` gets as many as fit, at least 2; several grow in turn, the one with the fewest first.

        Raises:
            UserError: even 2 levels do not fit.
        """
        free = {name: 2 for name, span in self.ranges.items() if not span.choices and span.levels is None}
        values = {name: span.choices or levels(span, span.levels or 2) for name, span in self.ranges.items()}
        if (needed := self.count(values)) > n_points:
            raise UserError(f"the grid has {needed} points; set n_trials to at least {needed}, or give fewer choices or levels.")
        while free:
            name = min(free, key=lambda name: (free[name], name))
            finer = {**values, name: levels(self.ranges[name], free[name] + 1)}
            if free[name] < n_points and self.count(finer) <= n_points:
                free[name], values = free[name] + 1, finer
            else:
                del free[name]
        return self.points(values)

    def _check_conditions(self) -> None:
        wanted: dict[str, list[Any]] = {other: [_ELSE] for other in self._parents}
        for span in self.ranges.values():
            for other, values in span.when.items():
                wanted[other] += [value for value in values if can_be(self.ranges[other], value)]
        cases = self.points(wanted)
        for name, span in self.ranges.items():
            if not any(self.active(name, case) for case in cases):
                raise UserError(f"{name}: never searched, for what it asks of {' and '.join(span.when)} never holds.")


def levels(span: SearchRange, n: int) -> tuple[Any, ...]:
    """`n` values from `low` to `high`, evenly spaced (in the logarithm where `log`); whole numbers that coincide count once."""
    between = np.geomspace if span.log else np.linspace
    return tuple(dict.fromkeys(tidy(span, value) for value in between(span.low, span.high, n).tolist()))


def tidy(span: SearchRange, value: float) -> int | float:
    """A drawn number as it is tried: 6 significant digits, so that a digest never hangs on the last bit."""
    return round(value) if span.integer else min(max(float(f"{value:.6g}"), span.low), span.high)


def distribution(span: SearchRange) -> BaseDistribution:
    """The range for Optuna; choices by index, since one may be anything that JSON holds."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if span.choices:
        return CategoricalDistribution(tuple(range(len(span.choices))))
    if span.integer:
        return IntDistribution(int(span.low), int(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def encode(span: SearchRange, value: Any) -> Any:
    """A value for Optuna, as `distribution` holds it."""
    return next(i for i, choice in enumerate(span.choices) if among(value, [choice])) if span.choices else value


def ordered(ranges: Mapping[str, SearchRange]) -> list[str]:
    """Names in order of dependency; by name where that leaves a choice.

    Raises:
        UserError: conditions go round in a circle.
    """
    names: list[str] = []
    sorter = TopologicalSorter({name: [other for other in span.when if other in ranges] for name, span in ranges.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"the conditions go round in a circle: {' needs '.join(reversed(error.args[1]))}.") from None
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        names += ready
        sorter.done(*ready)
    return names


def among(value: Any, values: Collection[Any]) -> bool:
    """`in`, but true is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def can_be(span: SearchRange, value: Any) -> bool:
    """Whether a search may come upon exactly this value."""
    return _holds(span, value) and bool(span.choices or (span.integer and value == int(value)))


def _holds(span: SearchRange, value: Any) -> bool:
    if span.choices:
        return among(value, span.choices)
    return isinstance(value, int | float) and not isinstance(value, bool) and span.low <= value <= span.high


def _whole(span: SearchRange) -> range:
    return range(int(span.low), int(span.high) + 1)
