"""Decide which method of a family is best, and whether its comparisons allow one to say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.stats.comparisons import MAJORITY, Contrast, Family, Sample


@dataclass(frozen=True)
class Decision:
    """What the comparisons of a family show of the method with the best mean.

    `kind`: 'alone' (nothing to compare with), 'below_majority' (the majority class has the best mean), 'best' (significantly better
    than every other), 'majority_not_beaten' (not significantly better than the majority class), 'undecided' (not significantly better
    than some method). `runner_up` is the comparison with the second mean, `closest` that with the largest corrected p-value,
    `with_majority` that with the majority class; None where there is none. `indistinct` are the samples that `best` does not beat.
    """

    kind: Literal["alone", "below_majority", "best", "majority_not_beaten", "undecided"]
    best: Sample
    indistinct: Sequence[Sample] = ()
    runner_up: Contrast | None = None
    closest: Contrast | None = None
    with_majority: Contrast | None = None


def decide(family: Family) -> Decision:
    """Decide which method of `family` is best. How differences are tested is `analysis.stats.comparisons`' part."""
    best, *others = family.samples
    if not others:
        return Decision("alone", best)
    contrasts = [family.between(best, other) for other in others]
    indistinct = [contrast.b for contrast in contrasts if not contrast.significant]
    with_majority = next((contrast for contrast in contrasts if contrast.b.method == MAJORITY), None)
    closest = max(contrasts, key=lambda contrast: (contrast.p, -contrast.difference.mean))
    if best.method == MAJORITY:
        kind: Literal["below_majority", "best", "majority_not_beaten", "undecided"] = "below_majority"
    elif not indistinct:
        kind = "best"
    elif with_majority and not with_majority.significant:
        kind = "majority_not_beaten"
    else:
        kind = "undecided"
    return Decision(kind, best, indistinct, contrasts[0], closest, with_majority)


def main_family(families: Sequence[Family]) -> Family:
    """Return the family with the most methods, and of those the one with the most shots."""
    return max(families, key=lambda family: (len({sample.method for sample in family.samples}), family.n_shots))
