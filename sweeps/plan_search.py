"""The parts of a plan that say what is searched, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmft.spec import Spec


class RangeEntry(Spec):
    """What is tried for one hyper-parameter: between `low` and `high`, or one of `choices`.

    With `when: {schedule: [linear, cosine]}` it is searched only where the other hyper-parameter, searched or fixed, has such a
    value. A hyper-parameter that is not searched itself at some point has no value there, for the conditions of others.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()
    levels: int | None = Field(None, ge=2, description="values of a grid between low and high; null: as many as fit")
    when: dict[str, Any] = Field(default_factory=dict, description="other hyper-parameter -> its value, or a list of them")

    @model_validator(mode="after")
    def _consistent(self) -> RangeEntry:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give either low and high, or choices")
        if any(values == [] for values in self.when.values()):
            raise ValueError("when names no value")
        if self.choices:
            if self.levels:
                raise ValueError("levels is for low and high; choices are tried in full")
            if any(choice in self.choices[:index] for index, choice in enumerate(self.choices)):
                raise ValueError("choices names a value twice")
            return self
        if self.low is None or self.high is None or not -1e300 < self.low < self.high < 1e300:
            raise ValueError("low must be a number below high")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 where log is true")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("low and high must be whole numbers where integer is true")
        if self.integer and self.levels and self.levels > self.high - self.low + 1:
            raise ValueError(f"levels must be at most {int(self.high - self.low + 1)}, the whole numbers from low to high")
        return self


class PrunePlan(Spec):
    """When a trial of the search is given up before its last epoch: its best dev score so far is below a floor.

    The floors of a trial come from the points of earlier rounds alone (`sweeps.prune`), so they do not hang on who ran first.
    """

    rule: Literal["median", "asha"]
    min_epochs: int = Field(5, ge=1, description="every trial runs at least so long; the first rung of asha")
    reduction_factor: int = Field(3, ge=2, description="asha: the rungs' ratio, and 1 in so many goes on at each")
    min_points: int = Field(4, ge=1, description="earlier points that must have come to an epoch before it has a floor")


class SearchPlan(Spec):
    """How hyper-parameters are searched, with the same budget in every cell.

    `n_trials` points are tried in each cell, each with every one of `seeds`; a space that holds fewer is tried in full. They are
    asked for in rounds of `round_size`: a round's points depend on the plan and on earlier rounds, so a larger round runs wider
    and learns less. The samplers are described in `sweeps.search`.
    """

    n_trials: int = Field(8, ge=1, description="points in each cell")
    seeds: tuple[int, ...] = Field((100, 101), min_length=1)
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    round_size: int = Field(4, ge=1, description="points that are tried at the same time")
    seed: int = 0
    prune: PrunePlan | None = Field(None, description="null: no point is given up")
