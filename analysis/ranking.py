"""What can be told of the methods of one model and task: a ranking that shows which places are sure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from analysis.contrasts import MAJORITY, Family
from analysis.headline import p_text
from analysis.layout import TITLES, interval, percent
from analysis.sheets import Sheet, trimmed
from analysis.stats import half_width

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Ranking(NamedTuple):
    """The methods of a family, best mean first. Two that share a group letter cannot be told apart."""

    title: str
    sheet: Sheet


def ranking(family: Family) -> Ranking:
    """Each method with its distance from the best one, the corrected p-value, and the groups that it belongs to."""
    best, groups = family.samples[0], family.groups
    sheet = Sheet(["Method", "n", "Mean", "Behind the best (95 %)", "p", "Group"], numeric=(1, 2, 3, 4))
    for sample in family.samples:
        behind, p = "–", "–"
        if sample is not best:
            contrast = family.between(best, sample)
            low, high = percent(contrast.difference.low), percent(contrast.difference.high)
            span = "" if low == "–" else f" ({low} to {high})"
            behind, p = f"{percent(contrast.difference.mean)}{span}", p_text(contrast.p).removeprefix("p ").removeprefix("= ")
        letters = "".join(_letter(i) if sample in group else "·" for i, group in enumerate(groups))
        name = family.name(sample).removeprefix("the ")
        half = half_width(sample.scores)
        n = "–" if sample.method == MAJORITY else str(len(sample.scores))
        sheet.rows.append([name, n, interval(sample.mean, half), behind, p, letters])
    shots = f", {family.n_shots} shots" if family.n_shots else ""
    return Ranking(f"{family.model} on {family.task}{shots}: {TITLES[family.domain].lower()}", sheet)


def difference_sheet(found: Iterable[Family]) -> Sheet:
    """Every method against the best one of its family: the comparisons behind the bold numbers."""
    headers = [
        "model",
        "task",
        "shots",
        "domain",
        "best",
        "other",
        "difference (95 %)",
        "p",
        "p, corrected",
        "pairs",
        "test",
        "would see",
    ]
    sheet = Sheet(headers, numeric=(2, 6, 7, 8, 9, 11))
    for family in found:
        best = family.samples[0]
        for other in family.samples[1:]:
            each = family.between(best, other)
            mean, low, high = (percent(value) for value in each.difference[:3])
            p, corrected = (p_text(value).removeprefix("p ").removeprefix("= ") for value in (each.difference.p, each.p))
            names = [family.name(sample).removeprefix("the ") for sample in (best, other)]
            sheet.rows.append([
                family.model, family.task, str(family.n_shots), family.domain.replace("_", " "), *names,
                mean if low == "–" else f"{mean} ({low} to {high})", p, corrected, str(each.difference.n), each.difference.test or "–",
                percent(each.detectable),
            ])  # fmt: skip
    return trimmed(sheet, "model", "task")


def _letter(index: int) -> str:
    high, low = divmod(index, len(_LETTERS))
    return (_letter(high - 1) if high else "") + _LETTERS[low]
