"""Cells: what a plan compares. Each is one model, task, method, number of shots and pattern, ready to give trial specs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from llmft.config import TrainSpec, TrialSpec
from llmft.errors import UserError, error_lines
from llmft.methods import SearchRange, complete_settings, method_class
from llmft.seeds import SeedName
from sweeps.planning.schema import ModelEntry, SearchPlan
from sweeps.planning.search_space import Params, Space, values_of


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the comparison.

    Attributes:
        entry: the name of the plan's method entry.
        base: the trial that is reported, with the default hyper-parameters and seed 0.
        search_base: the same for the search: scored on dev alone, on no test set.
        ranges: what is searched; empty where the defaults are used.
        search: budget and seeds of the search; None where nothing is searched.
        report_seeds: seeds that are reported; one where no seed changes the answer.
        vary: the streams that have these seeds; the others have the first.
        model_entry: what the plan says about the model, and so about what a trial gets.
    """

    entry: str
    base: TrialSpec
    search_base: TrialSpec
    ranges: Mapping[str, SearchRange]
    search: SearchPlan | None
    report_seeds: tuple[int, ...]
    vary: tuple[SeedName, ...]
    model_entry: ModelEntry

    @cached_property
    def key(self) -> str:
        """What tells this cell from others, on any machine and in any plan."""
        return self.base.digest

    @property
    def selection(self) -> str:
        """The checkpoint that the search compares points by."""
        return self.search_base.selections[0]

    @property
    def trains(self) -> bool:
        """Whether weights are changed; if not, there is nothing to search."""
        return self.base.selections != ("none",)

    @cached_property
    def space(self) -> Space:
        """The points that the search may try."""
        return Space(self.ranges)

    @cached_property
    def defaults(self) -> Params:
        """The values that the searched hyper-parameters have when nothing is searched."""
        values = values_of(self.base.train, self.base.settings)
        return {name: values[name] for name in self.space.ranges}

    def search_spec(self, params: Params, seed: int) -> TrialSpec:
        """One trial of the search."""
        return _with_params(self.search_base, params).with_seed(seed)

    def report_spec(self, params: Params, seed: int) -> TrialSpec:
        """One reported trial."""
        return _with_params(self.base, params).with_seed(self.report_seeds[0]).with_seed(seed, self.vary)

    def __str__(self) -> str:
        return f"{self.base.model.name} {self.base.task} {self.entry} {self.base.n_shots} shots ({self.base.pattern})"


def _with_params(spec: TrialSpec, params: Params) -> TrialSpec:
    own = method_class(spec.method).Settings.model_fields  # a setting of the method goes before a training field of that name
    train = {name: value for name, value in params.items() if name not in own}
    settings = {name: value for name, value in params.items() if name in own}
    return spec.model_copy(
        update={
            "train": TrainSpec.model_validate({**spec.train.model_dump(), **train}) if train else spec.train,
            "settings": complete_settings(spec.method, {**spec.settings, **settings}) if settings else spec.settings,
        }
    )


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
        if cell.search and cell.search.sampler == "grid":
            cell.space.grid(cell.search.n_trials)
    except UserError as error:
        raise UserError(f"{where}.search: {error}") from None
