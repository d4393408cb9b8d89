"""Hyper-parameter search in rounds, without state: what a round asks for follows from the plan and from earlier rounds alone.

A search is an Optuna study that is asked for a round's points and then told how they did, in the order in which they were asked
for; before each round its sampler is seeded anew by the plan, the cell and the round. So a plan leads to the same trials on any
number of workers, in any order of completion and after any interruption.

tpe: Optuna's multivariate TPE (Bergstra et al. 2011), with the first points at random; where ranges have conditions, one model
    for each group of hyper-parameters that are searched together.
random: uniform, in the logarithm where `log`.
grid: `Space.grid`, walked in its order; what the grid leaves of the budget is drawn at random, so that cells stay comparable.
cmaes: Optuna's CMA-ES (Hansen 2016) after a first round at random. A generation is as many whole rounds as hold its default
    population, so that no point is lost to it but the dead and the pruned. It moves the numbers that are searched everywhere:
    choices, and what has a condition, are drawn at random, and where nothing else is searched it is the random sampler.

But for the grid, the first point of a cell is its method's defaults, if the ranges hold them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmft.errors import Cause
from llmft.records import TrialRecord
from llmft.seeds import derive
from sweeps.planning import Params, SearchPlan, Space, distribution, encode, tidy
from sweeps.search.pruning import Curve, PruningThresholds, curve, given_up_at, mean_curve

if TYPE_CHECKING:
    import optuna


N_STARTUP = 5
"""Points before TPE takes over from random draws. It must not depend on the budget: a longer search begins like a shorter one."""

N_FRESH_DRAWS, N_RANDOM_DRAWS = 20, 200
"""How often a draw is repeated to find a point that was not tried yet: by the sampler, then at random."""


@dataclass(frozen=True)
class PointOutcome:
    """How a searched point did.

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
        """Smaller is better: by score, ties by loss."""
        return (math.inf, math.inf) if self.score is None else (-self.score, self.loss)


def summarize_point(
    params: Params, records: Sequence[TrialRecord], selection: str, stop_below: PruningThresholds | None = None
) -> PointOutcome:
    """What the trials of one point, one for each search seed, say about it.

    A point with a dead seed is a dead point; else one with a seed that falls below the floors `stop_below` is a pruned one.
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
    """The best point: highest dev score, then lowest dev loss, then the one asked for first. None if all are dead or pruned."""
    alive = [outcome for outcome in outcomes if outcome.score is not None]
    return min(alive, key=lambda outcome: outcome.rank) if alive else None


class Search:
    """The search of one cell: `ask` for a round, `tell` its outcomes, and so on.

    Both may be called again for rounds that are over. Rounds that were told something else before are asked for anew, so the
    points of a round follow from what was told last of those before it, whatever came in between.

    Args:
        space: what is searched.
        plan: budget, sampler and seed.
        cell_key: identifies the cell.
        defaults: the values of the hyper-parameters when nothing is searched.
    """

    def __init__(self, space: Space, plan: SearchPlan, cell_key: str, defaults: Params):
        self.space, self.plan, self.cell_key, self.defaults = space, plan, cell_key, defaults
        self.n_points = int(min(plan.n_trials, space.size))
        self.n_rounds = math.ceil(self.n_points / plan.round_size)
        self._grid = space.grid(plan.n_trials) if plan.sampler == "grid" else []
        self._start()

    def ask(self, index: int) -> list[Params]:
        """The points of round `index`, from 0; all rounds before it must have been told.

        Returns:
            at most `plan.round_size` points, the same list as long as the rounds before it were told nothing else. None stands
            twice in a search, unless fresh ones are not found.
        """
        if index == len(self._asked):
            self._draw(index)
        return self._asked[index]

    def tell(self, index: int, outcomes: Sequence[PointOutcome]) -> None:
        """How the points of round `index` did, in the order in which they were asked for."""
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
            _tell(self._study, trial, outcome)
        self._told.append(list(outcomes))

    def _start(self) -> None:
        self._asked: list[list[Params]] = []
        self._told: list[list[PointOutcome]] = []
        self._study: optuna.Study | None = None
        self._trials: list[list[optuna.Trial]] = []  # of each round, for the points that are not of the grid

    def _draw(self, index: int) -> None:
        first = index * self.plan.round_size
        n_points = min(self.plan.round_size, self.n_points - first)
        self._asked.append(self._grid[first : first + n_points])
        self._trials.append([])
        if len(self._asked[-1]) == n_points:
            return
        seed = derive(self.plan.seed, f"{self.cell_key}/{index}") % 2**32  # numpy's limit
        tried, repeated = [point for points in self._asked for point in points], []
        samplers = [self._sampler(seed)] * N_FRESH_DRAWS + [_random(seed)] * N_RANDOM_DRAWS
        self._study = self._study or self._new_study()
        while len(self._asked[-1]) < n_points:
            for n_draws, sampler in enumerate(samplers, 1):
                self._study.sampler = sampler
                trial = self._study.ask()
                point = self._suggest(trial)
                if point not in tried or n_draws == len(samplers):
                    break
                repeated.append(trial)
            tried.append(point)
            self._asked[-1].append(point)
            self._trials[-1].append(trial)
        for trial in repeated:
            _tell(self._study, trial, PointOutcome({}, None))

    def _new_study(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize")
        if not self._grid and self.space.holds(self.defaults):
            study.enqueue_trial({name: encode(self.space.ranges[name], value) for name, value in self.defaults.items()})
        return study

    def _suggest(self, trial: optuna.Trial) -> Params:
        point: Params = {}
        for name, span in self.space.ranges.items():
            if not self.space.active(name, point):
                continue
            if span.choices:
                point[name] = span.choices[trial.suggest_categorical(name, range(len(span.choices)))]
            elif span.integer:
                point[name] = trial.suggest_int(name, int(span.low), int(span.high), log=span.log)
            else:
                point[name] = tidy(span, trial.suggest_float(name, span.low, span.high, log=span.log))
        return point

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        conditional = any(span.when for span in self.space.ranges.values())
        if self.plan.sampler == "tpe":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=N_STARTUP, constant_liar=True, multivariate=True, group=conditional
                )
        numbers = [name for name, span in self.space.ranges.items() if not span.choices and not span.when]
        if self.plan.sampler == "cmaes" and numbers:
            return _cmaes({name: distribution(self.space.ranges[name]) for name in sorted(numbers)}, self.plan.round_size, seed)
        return _random(seed)


def _random(seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


def _cmaes(numbers: Mapping[str, Any], round_size: int, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    class CmaEs(optuna.samplers.CmaEsSampler):
        """Optuna infers the numbers from past trials, and stops for good once a condition has changed them."""

        def infer_relative_search_space(self, study, trial):
            return numbers

    population = 4 + math.floor(3 * math.log(len(numbers)))  # Hansen 2016, table 1
    return CmaEs(seed=seed, popsize=math.ceil(population / round_size) * round_size, warn_independent_sampling=False)


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: PointOutcome) -> None:
    import optuna

    if outcome.score is not None:
        study.tell(trial, outcome.score)
        return
    for epoch, accuracy in outcome.curve.items():
        trial.report(accuracy, epoch)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED if outcome.pruned else optuna.trial.TrialState.FAIL)
