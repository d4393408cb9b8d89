"""What a cell searches: its method's ranges, as the plan changes them, with conditions that can hold and values that are allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmft.errors import UserError, error_lines, unknown_name
from llmft.method import Method, Range
from llmft.spec import TrainSpec
from sweeps.space import Params, among, can_be, ordered

if TYPE_CHECKING:
    from sweeps.cells import Cell
    from sweeps.plan import MethodEntry, Plan


def values_of(train: TrainSpec, settings: Params) -> Params:
    """Every hyper-parameter's value; a setting of the method goes before a training field of that name."""
    return {**train.model_dump(mode="json"), **settings}


def ranges_of(where: str, plan: Plan, entry: MethodEntry, cls: type[Method], values: Params) -> dict[str, Range]:
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
            ranges[name] = Range(**span.model_dump())
    return _settle_conditions(f"{where}.search", ranges, values, entry.search)


def _settle_conditions(where: str, ranges: Mapping[str, Range], values: Params, asked: Collection[str]) -> dict[str, Range]:
    """`ranges` by name, with conditions on searched hyper-parameters alone: what is fixed has been looked at.

    Where a condition never holds, a range of the method's own is left out, and one that the plan asks for is a mistake.
    """
    settled: dict[str, Range] = {}
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


def check_ranges(where: str, cell: Cell) -> None:
    """See to it that every end and choice is a value that the hyper-parameter may have, and that a grid fits into the budget.

    Raises:
        UserError: one is not, or it does not.
    """
    for name, span in cell.ranges.items():
        ends = [int(end) if span.integer else end for end in (span.low, span.high)]
        for value in span.choices or ends:
            try:
                cell.search_spec({name: value}, 0)
            except ValidationError as error:
                raise UserError(error_lines(error, f"{where}.search")) from None
            except UserError as error:
                raise UserError(f"{where}.search: {error}") from None
    try:
        space = cell.space
        if cell.search and cell.search.sampler == "grid":
            space.grid(cell.search.n_trials)
    except UserError as error:
        raise UserError(f"{where}.search: {error}") from None
