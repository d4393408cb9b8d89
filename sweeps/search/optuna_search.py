"""Hyper-parameter search in rounds: the points of a round follow from the plan and from the outcomes of earlier rounds alone.

A search is an Optuna study that is asked for the points of a round, and then told their outcomes in the order in which it was asked.
Before each round its sampler is seeded anew by the plan, the cell and the round. So a plan leads to the same trials on any number
of workers, in any order of completion and after any interruption.

tpe: Optuna's multivariate TPE (Bergstra et al. 2011), after the first points at random.
gp: Optuna's Gaussian process with expected improvement, after the first points at random. A point takes about a second. On
    machines whose floating-point arithmetic differs, its points may differ in the last digits.
random: uniform, in the logarithm where `log`.
grid: `Space.grid`, in its order; the points that the grid leaves of the budget are drawn at random, so that cells stay comparable.

The first point of a cell is its method's defaults, if the ranges hold them; not so for the grid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmft.errors import Cause
from llmft.records import TrialRecord
from llmft.seeds import derive
from sweeps.planning import Params, SearchPlan, Space, decode, distribution, encode
from sweeps.search.pruning import Curve, PruningThresholds, curve, given_up_at, mean_curve

if TYPE_CHECKING:
    import optuna


N_STARTUP = 5
"""Points at random before a model proposes them. It must not depend on the budget: a longer search begins like a shorter one."""

N_FRESH_DRAWS = {"tpe": 20, "gp": 3, "random": 20, "grid": 20}
N_RANDOM_DRAWS = 200
"""How often a point is drawn in search of one that was not tried yet: by the sampler, then at random."""


@dataclass(frozen=True)
class PointOutcome:
    """The outcome of one point of a search.

    Attributes:
        params: the point.
        score: mean of the dev score over the search seeds; None if a trial failed or was given up.
        loss: the same of the dev loss.
        curve: epoch -> mean of the best dev score so far.
        pruned: whether one of its trials was given up (and none failed).
    """

    params: Params
    score: float | None
    loss: float = math.inf
    curve: Curve = field(default_factory=dict)
    pruned: bool = False

    @property
    def rank(self) -> tuple[float, float]:
        """Key to sort by, best first: by score, ties by loss."""
        return (math.inf, math.inf) if self.score is None else (-self.score, self.loss)


def summarize_point(
    params: Params, records: Sequence[TrialRecord], selection: str, stop_below: PruningThresholds | None = None
) -> PointOutcome:
    """Summarize the records of one point, one for each search seed.

    A point with a failed trial has failed; else a point with a trial that falls below the thresholds `stop_below` is pruned.
    """
    curves, pruned = [], False
    for record in records:
        points = curve(record)
        end = given_up_at(record, stop_below or {})
        if end is None and record.cause is Cause.PRUNED:
            end = max(points, default=0)
        if end is not None:
            pruned, points = True, {epoch: best for epoch, best in points.items() if epoch <= end}
        elif not math.isfinite(record.dev_score.get(selection, math.nan) if record.finished else math.nan):
            return PointOutcome(params, None)
        curves.append(points)
    if pruned:
        return PointOutcome(params, None, curve=mean_curve(curves), pruned=True)
    score = sum(record.dev_score[selection] for record in records) / len(records)
    loss = sum(record.dev_loss.get(selection, math.inf) for record in records) / len(records)
    return PointOutcome(params, score, loss if math.isfinite(loss) else math.inf, mean_curve(curves))


def best_point(outcomes: Sequence[PointOutcome]) -> PointOutcome | None:
    """Choose the point with the highest dev score, then the lowest dev loss, then the earliest. None if all failed or were pruned."""
    scored = [outcome for outcome in outcomes if outcome.score is not None]
    return min(scored, key=lambda outcome: outcome.rank, default=None)


class Search:
    """The search of one cell: `ask` for the points of a round, `tell` their outcomes, and so on.

    Both may be called again for rounds that are over. When a round is told other outcomes than before, the rounds after it are
    asked for anew, so that points follow from the outcomes that were told last.

    Args:
        space: the points that may be tried.
        plan: budget, sampler and seed.
        cell_key: identifies the cell.
        defaults: the values of the hyper-parameters when nothing is searched.
    """

    def __init__(self, space: Space, plan: SearchPlan, cell_key: str, defaults: Params):
        self.space, self.plan, self.cell_key, self.defaults = space, plan, cell_key, defaults
        self.n_points = int(min(plan.n_trials, space.size))
        self.n_rounds = math.ceil(self.n_points / plan.round_size)
        self._grid = space.grid(plan.n_trials) if plan.sampler == "grid" else []
        self._distributions = {name: distribution(span) for name, span in space.ranges.items()}
        self._start()

    def ask(self, index: int) -> list[Params]:
        """Give the points of round `index`, from 0; all rounds before it must have been told.

        Returns:
            at most `plan.round_size` points, the same list as long as the rounds before it are told the same. No point stands
            twice in a search, unless `N_RANDOM_DRAWS` find no other.
        """
        if index == len(self._asked):
            self._draw(index)
        return self._asked[index]

    def tell(self, index: int, outcomes: Sequence[PointOutcome]) -> None:
        """Take the outcomes of the points of round `index`, in the order of `ask`."""
        if index < len(self._told):
            if self._told[index] == outcomes:
                return
            earlier = self._told[:index]
            self._start()
            for i, told in enumerate(earlier):
                self.ask(i)
                self.tell(i, told)
            self.ask(index)
        n_of_grid = len(outcomes) - len(self._trials[index])
        for trial, outcome in zip(self._trials[index], outcomes[n_of_grid:], strict=True):
            self._tell(trial, outcome)
        self._told.append(list(outcomes))

    def _start(self) -> None:
        import optuna

        quiet = self.plan.sampler == "gp"  # it warns that it were faster with the package greenlet
        optuna.logging.set_verbosity(optuna.logging.ERROR if quiet else optuna.logging.WARNING)
        self._asked: list[list[Params]] = []
        self._told: list[list[PointOutcome]] = []
        self._study = optuna.create_study(direction="maximize")
        self._trials: list[list[optuna.Trial]] = []  # of each round, for the points that are not of the grid
        if not self._grid and self.space.contains(self.defaults):
            self._study.enqueue_trial({name: encode(self.space.ranges[name], value) for name, value in self.defaults.items()})

    def _draw(self, index: int) -> None:
        """Draw the points of a round, from the grid as far as it goes."""
        first = index * self.plan.round_size
        n_points = min(self.plan.round_size, self.n_points - first)
        points = self._grid[first : first + n_points]
        trials: list[optuna.Trial] = []
        self._asked.append(points)
        self._trials.append(trials)
        if len(points) == n_points:
            return
        seed = derive(self.plan.seed, f"{self.cell_key}/{index}") % 2**32  # numpy's limit
        samplers = [_sampler(self.plan.sampler, seed)] * N_FRESH_DRAWS[self.plan.sampler]
        samplers += [_sampler("random", seed)] * N_RANDOM_DRAWS
        tried, repeated = [point for asked in self._asked for point in asked], []
        while len(points) < n_points:
            for n_draws, self._study.sampler in enumerate(samplers, 1):
                trial = self._study.ask(self._distributions)
                point = {name: decode(span, trial.params[name]) for name, span in self.space.ranges.items()}
                if point not in tried or n_draws == len(samplers):
                    break
                repeated.append(trial)
            tried.append(point)
            points.append(point)
            trials.append(trial)
        for trial in repeated:
            self._tell(trial, PointOutcome({}, None))

    def _tell(self, trial: optuna.Trial, outcome: PointOutcome) -> None:
        from optuna.trial import TrialState

        if outcome.score is not None:
            self._study.tell(trial, outcome.score)
            return
        for epoch, score in outcome.curve.items():
            trial.report(score, epoch)
        self._study.tell(trial, state=TrialState.PRUNED if outcome.pruned else TrialState.FAIL)


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import exceptions, samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
        if name == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=N_STARTUP, constant_liar=True, multivariate=True)
        if name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=N_STARTUP)
    return samplers.RandomSampler(seed=seed)
