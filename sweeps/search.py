"""Hyper-parameter search in rounds, without state: what a round asks for follows from the plan and from earlier rounds alone.

An Optuna study is rebuilt for every round from the earlier rounds' points in canonical order, and its sampler is seeded by the
plan, the cell and the round. So a plan leads to the same trials on any number of workers, in any order of completion and after
any interruption. The first point of a cell is its method's defaults, if the ranges hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmft.method import Range
from llmft.record import TrialRecord
from llmft.seeds import derive
from sweeps.cells import Params
from sweeps.plan import SearchPlan

if TYPE_CHECKING:
    import optuna

N_STARTUP = 5
"""Points before TPE takes over from random draws. It must not depend on the budget: a longer search begins like a shorter one."""

N_FRESH_DRAWS = 20
"""How often a draw is repeated to find a point that was not tried yet."""


@dataclass(frozen=True)
class Outcome:
    """A searched point. `accuracy` and `loss` are means over the search seeds on dev; None if any of the trials failed."""

    params: Params
    accuracy: float | None
    loss: float = math.inf

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: by accuracy, ties by loss."""
        return (math.inf, math.inf) if self.accuracy is None else (-self.accuracy, self.loss)


def judge(params: Params, records: Sequence[TrialRecord], selection: str) -> Outcome:
    """What the trials of one point, one for each search seed, say about it. A point with a dead seed is a dead point."""
    accuracies = [record.dev_accuracy.get(selection) if record.finished else None for record in records]
    if any(value is None or not math.isfinite(value) for value in accuracies):
        return Outcome(params, None)
    losses = [record.dev_loss.get(selection, math.inf) for record in records]
    loss = sum(losses) / len(losses)
    return Outcome(params, sum(accuracies) / len(accuracies), loss if math.isfinite(loss) else math.inf)


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best point: highest dev accuracy, then lowest dev loss, then the one asked for first. None if all are dead."""
    alive = [outcome for outcome in outcomes if outcome.accuracy is not None]
    return min(alive, key=lambda outcome: outcome.rank) if alive else None


def n_rounds(search: SearchPlan) -> int:
    return math.ceil(search.n_trials / search.round_size)


def suggest(
    ranges: Mapping[str, Range],
    search: SearchPlan,
    cell_key: str,
    defaults: Params,
    history: Sequence[Outcome],
    round_index: int,
) -> list[Params]:
    """The points of one round.

    Args:
        ranges: what is searched.
        search: budget, sampler and seed.
        cell_key: identifies the cell.
        defaults: the values of the hyper-parameters when nothing is searched.
        history: outcomes of all earlier rounds, in the order in which their points were asked for.
        round_index: from 0.

    Returns:
        at most `search.round_size` points; floats have 6 significant digits, so that a digest never hangs on the last bit.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: _distribution(span) for name, span in ranges.items()}
    study = optuna.create_study(
        direction="maximize", sampler=_sampler(search.sampler, derive(search.seed, f"{cell_key}/{round_index}"))
    )
    study.add_trials([_past_trial(outcome, ranges, space) for outcome in history])
    n_points = min(search.round_size, search.n_trials - round_index * search.round_size)
    seen = [outcome.params for outcome in history]
    asked: list[Params] = []
    if round_index == 0 and all(_holds(ranges[name], value) for name, value in defaults.items()):
        study.enqueue_trial(_encode(defaults, ranges))
    while len(asked) < n_points:
        for _ in range(N_FRESH_DRAWS):
            point = _decode(study.ask(space).params, ranges)
            if point not in seen:
                break
        seen.append(point)
        asked.append(point)
    return asked


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    seed %= 2**32  # numpy's limit
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_STARTUP, constant_liar=True)


def _distribution(span: Range) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if span.choices:
        return CategoricalDistribution(tuple(range(len(span.choices))))  # by index: a choice may be anything that JSON holds
    if span.integer:
        return IntDistribution(int(span.low), int(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _past_trial(outcome: Outcome, ranges: Mapping[str, Range], space: dict[str, Any]) -> optuna.trial.FrozenTrial:
    import optuna

    state = optuna.trial.TrialState.FAIL if outcome.accuracy is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(
        params=_encode(outcome.params, ranges), distributions=space, value=outcome.accuracy, state=state
    )


def _holds(span: Range, value: Any) -> bool:
    if span.choices:
        return value in span.choices
    return isinstance(value, int | float) and not isinstance(value, bool) and span.low <= value <= span.high


def _encode(params: Params, ranges: Mapping[str, Range]) -> Params:
    return {name: span.choices.index(params[name]) if span.choices else params[name] for name, span in ranges.items()}


def _decode(raw: Params, ranges: Mapping[str, Range]) -> Params:
    def value(span: Range, drawn: Any) -> Any:
        if span.choices:
            return span.choices[drawn]
        return drawn if span.integer else min(max(float(f"{drawn:.6g}"), span.low), span.high)

    return {name: value(span, raw[name]) for name, span in ranges.items()}
