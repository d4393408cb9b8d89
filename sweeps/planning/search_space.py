"""The search space of a cell: its method's ranges as the plan changes them, and the points that they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmft.config import TrainSpec
from llmft.errors import UserError, unknown_name
from llmft.methods import Method, SearchRange

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from sweeps.planning.schema import MethodEntry, Plan

Params = dict[str, Any]
"""Values of hyper-parameters, by the name of a method's setting or of a `TrainSpec` field."""


def values_of(train: TrainSpec, settings: Params) -> Params:
    """Collect the value of every hyper-parameter; a setting of the method goes before a training field of that name."""
    return {**train.model_dump(mode="json"), **settings}


def ranges_of(where: str, plan: Plan, entry: MethodEntry, method: type[Method], names: Collection[str]) -> dict[str, SearchRange]:
    """Collect what a method entry searches: the method's own ranges that the plan does not fix, then those of the entry.

    Args:
        where: the entry, for messages.
        names: every hyper-parameter that there is.

    Raises:
        UserError: the entry names another.
    """
    fixed = {*plan.train, *entry.train, *entry.settings}
    ranges = {name: span for name, span in method.search.items() if name not in fixed}
    for name, span in entry.search.items():
        if name not in names:
            raise unknown_name("hyper-parameter", name, names, f"{where}.search")
        ranges.pop(name, None)
        if span is not None:
            ranges[name] = SearchRange(**span.model_dump(exclude_defaults=True))
    return dict(sorted(ranges.items()))


class Space:
    """The points that `ranges` hold, by hyper-parameter; in the order of their names."""

    def __init__(self, ranges: Mapping[str, SearchRange]):
        self.ranges = dict(sorted(ranges.items()))

    @property
    def size(self) -> float:
        """How many points there are; infinite if a range is continuous."""
        spans = self.ranges.values()
        if not all(span.choices or span.integer for span in spans):
            return math.inf
        return math.prod(len(span.choices) or int(span.high) - int(span.low) + 1 for span in spans)

    def contains(self, params: Params) -> bool:
        """Whether each of `params` lies in its range."""
        return all(_contains(self.ranges[name], value) for name, value in params.items())

    def grid(self, n_points: int) -> list[Params]:
        """List the points of a grid, the last hyper-parameter changing fastest.

        Choices are taken in full, ranges evenly from `low` to `high` (in the logarithm where `log`). A range gets as many values as
        fit, at least 2; several ranges grow in turn, the one with the fewest values first.

        Args:
            n_points: how many points there may be at most.

        Raises:
            UserError: even 2 values of each range do not fit.
        """
        growing = {name: 2 for name, span in self.ranges.items() if not span.choices}
        values = {name: span.choices or spaced_values(span, 2) for name, span in self.ranges.items()}
        if (needed := _n_combinations(values)) > n_points:
            raise UserError(f"the grid has {needed} points; set n_trials to at least {needed}, or give fewer choices.")
        while growing:
            name = min(growing, key=lambda name: (growing[name], name))
            finer = {**values, name: spaced_values(self.ranges[name], growing[name] + 1)}
            if growing[name] < n_points and _n_combinations(finer) <= n_points:
                growing[name], values = growing[name] + 1, finer
            else:
                del growing[name]
        return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _n_combinations(values: Mapping[str, Sequence[Any]]) -> int:
    return math.prod(map(len, values.values()))


def spaced_values(span: SearchRange, n: int) -> tuple[Any, ...]:
    """List `n` values from `low` to `high`, evenly spaced (in the logarithm where `log`); equal whole numbers count once."""
    between = np.geomspace if span.log else np.linspace
    return tuple(dict.fromkeys(rounded(span, value) for value in between(span.low, span.high, n).tolist()))


def rounded(span: SearchRange, value: float) -> float:
    """Round a sampled value to 6 significant digits, so that the trial's digest does not depend on the last bit."""
    return round(value) if span.integer else min(max(float(f"{value:.6g}"), span.low), span.high)


def distribution(span: SearchRange) -> BaseDistribution:
    """Convert a range to Optuna's class; choices by index, since a choice may be anything that JSON holds."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if span.choices:
        return CategoricalDistribution(tuple(range(len(span.choices))))
    if span.integer:
        return IntDistribution(int(span.low), int(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def encode(span: SearchRange, value: Any) -> Any:
    """Convert a value to what `distribution` holds for it."""
    return next(i for i, choice in enumerate(span.choices) if _same(value, choice)) if span.choices else value


def decode(span: SearchRange, value: Any) -> Any:
    """Convert a value that Optuna has drawn from `distribution` to that of the hyper-parameter."""
    return span.choices[value] if span.choices else rounded(span, value)


def _contains(span: SearchRange, value: Any) -> bool:
    if span.choices:
        return any(_same(value, choice) for choice in span.choices)
    return isinstance(value, int | float) and not isinstance(value, bool) and span.low <= value <= span.high


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal; unlike in Python, true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
