"""Rank the methods of one model and task, with groups of those that are not significantly different."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import NamedTuple

from analysis.stats import MAJORITY, Contrast, Family, shown_half_width
from analysis.tables.formatting import TITLES, interval, letter, p_entry, percent, span
from analysis.tables.text_table import TextTable, trim_columns

_LETTERS = string.ascii_uppercase


class Ranking(NamedTuple):
    """The methods of a family, best mean first. Two that share a group letter cannot be told apart."""

    title: str
    table: TextTable


def build_ranking(family: Family) -> Ranking:
    """Rank the methods of a family: the distance from the best, the corrected p-value, and the groups of each."""
    best, groups = family.samples[0], family.groups
    table = TextTable(["Method", "n", "Mean", "Behind the best (95 %)", "p", "Group"], numeric=(1, 2, 3, 4))
    for sample in family.samples:
        behind, p = "–", "–"
        if sample is not best:
            contrast = family.between(best, sample)
            behind, p = _with_span(contrast), p_entry(contrast.p, contrast.difference.n)
        letters = "".join(letter(i, _LETTERS) if sample in group else "·" for i, group in enumerate(groups))
        name = family.name(sample).removeprefix("the ")
        half = shown_half_width(sample.scores)
        n = "–" if sample.method == MAJORITY else str(len(sample.scores))
        table.rows.append([name, n, interval(sample.mean, half), behind, p, letters])
    shots = f", {family.n_shots} shots" if family.n_shots else ""
    return Ranking(f"{family.model} on {family.task}{shots}: {TITLES[family.domain].lower()}", table)


def difference_table(families: Iterable[Family]) -> TextTable:
    """Compare every method with the best one of its family: the comparisons behind the bold numbers."""
    headers = ["model", "task", "shots", "domain", "best", "other", "difference (95 %)", "p", "p, corrected", "pairs", "test", "would see"]
    table = TextTable(headers, numeric=(2, 6, 7, 8, 9, 11))
    for family in families:
        best = family.samples[0]
        for other in family.samples[1:]:
            contrast = family.between(best, other)
            p, corrected = (p_entry(value, contrast.difference.n) for value in (contrast.difference.p, contrast.p))
            names = [family.name(sample).removeprefix("the ") for sample in (best, other)]
            table.rows.append([
                family.model, family.task, str(family.n_shots), family.domain.replace("_", " "), *names,
                _with_span(contrast), p, corrected, str(contrast.difference.n), contrast.difference.test or "–",
                percent(contrast.detectable) if contrast.testable else "–",
            ])  # fmt: skip
    return trim_columns(table, "model", "task")


def _with_span(contrast: Contrast) -> str:
    """'2.3 (0.4 to 4.2)', or the difference alone."""
    within = span(contrast.difference)
    return percent(contrast.difference.mean) + (f" ({within})" if within else "")
