"""What can be told of the methods of one model and task: a ranking that shows which places are sure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from analysis.stats import MAJORITY, Contrast, Family, shown_half_width
from analysis.tables.formatting import TITLES, interval, p_entry, percent, span
from analysis.tables.text_table import TextTable, trim_columns

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Ranking(NamedTuple):
    """The methods of a family, best mean first. Two that share a group letter cannot be told apart."""

    title: str
    sheet: TextTable


def build_ranking(family: Family) -> Ranking:
    """Each method with its distance from the best one, the corrected p-value, and the groups that it belongs to."""
    best, groups = family.samples[0], family.groups
    sheet = TextTable(["Method", "n", "Mean", "Behind the best (95 %)", "p", "Group"], numeric=(1, 2, 3, 4))
    for sample in family.samples:
        behind, p = "–", "–"
        if sample is not best:
            contrast = family.between(best, sample)
            behind, p = _with_span(contrast), p_entry(contrast.p, contrast.difference.n)
        letters = "".join(_letter(i) if sample in group else "·" for i, group in enumerate(groups))
        name = family.name(sample).removeprefix("the ")
        half = shown_half_width(sample.scores)
        n = "–" if sample.method == MAJORITY else str(len(sample.scores))
        sheet.rows.append([name, n, interval(sample.mean, half), behind, p, letters])
    shots = f", {family.n_shots} shots" if family.n_shots else ""
    return Ranking(f"{family.model} on {family.task}{shots}: {TITLES[family.domain].lower()}", sheet)


def difference_table(found: Iterable[Family]) -> TextTable:
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
    sheet = TextTable(headers, numeric=(2, 6, 7, 8, 9, 11))
    for family in found:
        best = family.samples[0]
        for other in family.samples[1:]:
            each = family.between(best, other)
            p, corrected = (p_entry(value, each.difference.n) for value in (each.difference.p, each.p))
            names = [family.name(sample).removeprefix("the ") for sample in (best, other)]
            sheet.rows.append([
                family.model, family.task, str(family.n_shots), family.domain.replace("_", " "), *names,
                _with_span(each), p, corrected, str(each.difference.n), each.difference.test or "–",
                percent(each.detectable) if each.told else "–",
            ])  # fmt: skip
    return trim_columns(sheet, "model", "task")


def _with_span(contrast: Contrast) -> str:
    """'2.3 (0.4 to 4.2)', or the difference alone."""
    within = span(contrast.difference)
    return percent(contrast.difference.mean) + (f" ({within})" if within else "")


def _letter(index: int) -> str:
    high, low = divmod(index, len(_LETTERS))
    return (_letter(high - 1) if high else "") + _LETTERS[low]
