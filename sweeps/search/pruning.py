"""When a trial of the search is given up: its best dev score so far falls below a floor that earlier rounds have set.

A floor at an epoch is a quantile over the earlier points that came so far, of their best dev score up to that epoch (the mean
over the search seeds). Points of the same round do not count, so that the floors, and with them the whole search, are the same
in any order of completion. Only dev is looked at.

median: at every look at dev from `min_epochs` on, the median (the rule of Golovin et al. 2017, Google Vizier, section 3.2.2, with
the best so far on both sides). asha: at the rungs `min_epochs * reduction_factor**k`, the quantile 1 - 1 / `reduction_factor` (Li
et al. 2020, Asynchronous Successive Halving; the quantile is interpolated as in Ray Tune's `AsyncHyperBandScheduler`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmft.config import TrainSpec
from llmft.errors import Cause
from llmft.records import TrialRecord

if TYPE_CHECKING:
    from sweeps.planning import PrunePlan


Curve = dict[int, float]
"""epoch -> best dev score up to it, at every look at dev."""

PruningThresholds = Mapping[int, float]
"""epoch -> dev score; see `llmft.runtime.Runtime.stop_below`."""


def failed(record: TrialRecord) -> bool:
    """Whether the trial failed; one that was given up did not."""
    return not record.finished and record.cause is not Cause.PRUNED


def curve(record: TrialRecord) -> Curve:
    """How well a trial had done at each of its looks at dev. A training that `train.patience` ended stays as good as it was."""
    points = _seen(record)
    if record.finished and points:
        last = max(points)
        points |= {epoch: points[last] for epoch in _looks(record.spec.train) if epoch > last}
    return points


def _seen(record: TrialRecord) -> Curve:
    best, points = -math.inf, {}
    for point in record.curve:
        if point.dev_score is not None:
            best = max(best, point.dev_score)
            points[point.epoch] = best
    return points


def _looks(train: TrainSpec) -> list[int]:
    """The epochs after which a training looks at dev, as long as it goes on."""
    return [*range(train.eval_every_epochs, train.epochs, train.eval_every_epochs), train.epochs]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, as far as all of them came."""
    shared = set(curves[0]).intersection(*curves[1:])
    return {epoch: math.fsum(curve[epoch] for curve in curves) / len(curves) for epoch in sorted(shared)}


def given_up_at(record: TrialRecord, floors: PruningThresholds) -> int | None:
    """The epoch at which `floors` end the trial; None if they do not.

    A record that came about under other floors, or none, is read as if these had been in force, as far as it was trained.
    """
    return next((epoch for epoch, best in _seen(record).items() if best < floors.get(epoch, -math.inf)), None)


def counts(record: TrialRecord, floors: PruningThresholds) -> bool:
    """Whether the record says how the trial ends under `floors`. One that was given up too early for them does not."""
    if record.cause is not Cause.PRUNED or given_up_at(record, floors) is not None:
        return True
    given = record.provenance.get("stop_below") or {}
    return bool(floors) and {int(epoch): floor for epoch, floor in given.items()} == dict(floors)


def pruning_thresholds(plan: PrunePlan | None, train: TrainSpec, earlier: Iterable[Curve]) -> dict[int, float]:
    """The floors of a trial, by the epochs at which it looks at dev; none at its last.

    Args:
        plan: the rule; None: nothing is pruned.
        train: the trial's training.
        earlier: mean curves of the points of earlier rounds, up to where a point was given up.

    Returns:
        rounded down to 6 digits, lest a trial as good as the floor falls below it by the last bit of a mean.
    """
    if plan is None:
        return {}
    earlier = [curve for curve in earlier if curve]
    share = 0.5 if plan.rule == "median" else 1 - 1 / plan.reduction_factor
    found = {}
    for epoch in _threshold_epochs(plan, train):
        best = [curve[max(seen for seen in curve if seen <= epoch)] for curve in earlier if min(curve) <= epoch <= max(curve)]
        if len(best) >= plan.min_points:
            found[epoch] = math.floor(1e6 * float(np.quantile(best, share))) / 1e6
    return found


def _threshold_epochs(plan: PrunePlan, train: TrainSpec) -> list[int]:
    looks = _looks(train)[:-1]
    if plan.rule == "median":
        return [epoch for epoch in looks if epoch >= plan.min_epochs]
    rungs, rung = [], plan.min_epochs
    while rung < train.epochs:
        rungs.append(rung)
        rung *= plan.reduction_factor
    return sorted({min((epoch for epoch in looks if epoch >= rung), default=0) for rung in rungs} - {0})
