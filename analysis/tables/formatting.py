"""Tables of numbers to tables of texts: percentages with one decimal, findings as letters that point to footnotes."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.stats import FEWEST, MAJORITY, Difference

if TYPE_CHECKING:
    import pandas as pd


def p_text(p: float) -> str:
    """'p = .03', 'p < .001', 'p = 1'; 'not tested' where it is not defined."""
    if math.isnan(p):
        return "not tested"
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("0.", ".", 1) if p < 0.995 else "p = 1"


def p_entry(p: float, n: int) -> str:
    """The same for a table; a dash where `n` trials are too few to test."""
    return "–" if n < FEWEST or math.isnan(p) else p_text(p).removeprefix("p ").removeprefix("= ")


def span(difference: Difference) -> str:
    """'0.4 to 4.2': the interval; empty where there are too few trials for one, or no spread."""
    _, low, high, _, n, _ = difference
    return f"{percent(low)} to {percent(high)}" if n >= FEWEST and high - low > 1e-12 else ""


STRONG = "Bold: no method with as many shots is shown to be better (paired by seed, Holm)"
LETTERS = "abcdefghijklmnoprstuvwxyz"  # no q: Unicode has no raised one
TITLES = {"in_domain": "In domain", "out_of_domain": "Out of domain"}
SHARES = ("accuracy", "macro_accuracy", "exact_match")
"""Metrics that are shares of examples, and so percentages."""


@dataclass(frozen=True)
class Entry:
    """One table cell. `marks` are letters of footnotes, `detail` what they say of this row, `order` what to sort by.

    `strong`: no method at the same number of shots is shown to be better.
    """

    text: str
    marks: str = ""
    detail: str = ""
    order: float | str = ""
    numeric: bool = True
    strong: bool = False


@dataclass(frozen=True)
class Block:
    """The table of one model and task. `metric` says what its numbers are: 'accuracy in %'."""

    model: str
    task: str
    metric: str
    headers: list[str]
    rows: list[list[Entry]] = field(default_factory=list)

    @property
    def idle(self) -> set[int]:
        """The columns that say nothing: one pattern for all, no failed trial."""
        found = {i for i, header in enumerate(self.headers) if header == "Pattern" and len({row[i].text for row in self.rows} - {"–"}) < 2}
        return found | {i for i, header in enumerate(self.headers) if header == "Failed" and not any(row[i].order > 0 for row in self.rows)}

    @property
    def spread(self) -> set[int]:
        """The columns of the standard deviation and the maximum; the interval stands beside the mean."""
        return {i for i, header in enumerate(self.headers) if header in ("sd", "max")}


def lay_out(comparison: pd.DataFrame) -> tuple[list[Block], dict[str, str]]:
    """The comparison as blocks of texts, one for each model and task, and the footnotes (letter -> text).

    A finding marks the number it concerns: the mean of its set, or the method's name where it concerns the trial or another set.
    """
    tally = [each for row in comparison.to_dict("records") for place in _places(row).values() for each in place]
    letters = {key: _letter(i) for i, key in enumerate(dict.fromkeys(each.key for each in tally))}
    footnotes = {letter: _footnote([each for each in tally if each.key == key]) for key, letter in letters.items()}
    blocks = []
    for (model, task), rows in comparison.groupby(["model", "task"], sort=False):
        oracle = " (oracle)" if rows["is_oracle"].any() else ""
        headers = ["Method", "Shots", "Pattern", "n", "Failed"]
        for prefix, title in TITLES.items():
            name = ", ".join(rows[f"{prefix}_set"].dropna().unique())
            headers += [f"{title}{f': {name}' if name else ''}{oracle}", "sd", "max"]
        blocks.append(
            Block(
                model,
                task,
                metric_name(rows["metric"]),
                [*headers, "Gap"],
                [list(_entries(row, letters)) for row in rows.to_dict("records")],
            )
        )
    return blocks, footnotes


def percent(value: float, signed: bool = False) -> str:
    """A share in [0, 1] as a percentage with one decimal; a dash for a missing one. A minus is a minus sign."""
    if math.isnan(value):
        return "–"
    return f"{round(100 * value, 1) + 0.0:{'+' if signed else ''}.1f}".replace("-", "−")


def unit(metric: object) -> str:
    """What stands behind a score that is shown times 100: ' %' for shares, nothing for other metrics (ROUGE, BLEU)."""
    return " %" if metric in SHARES else ""


def axis_name(trials: pd.DataFrame, domain: str) -> str:
    """'in domain: rte, accuracy in %': what an axis with the scores of a domain shows."""
    name = next(iter(trials[f"{domain}_set"].dropna()), "")
    return f"{TITLES[domain].lower()}{f': {name}' if name else ''}, {metric_name(trials['metric'])}"


def metric_name(metrics: pd.Series) -> str:
    """'accuracy in %', 'rougeL × 100'; several where the rows mix them."""
    names = list(dict.fromkeys(metrics.dropna())) or ["accuracy"]
    return ", ".join(f"{name.replace('_', ' ')} in %" if unit(name) else f"{name} × 100" for name in names)


def interval(mean: float, half_width: float) -> str:
    """'61.2 ± 3.1'; the mean alone where there is no interval."""
    return percent(mean) + ("" if math.isnan(half_width) else f" ± {percent(half_width)}")


@dataclass(frozen=True)
class Tally:
    """How many of a row's trials have a finding. `key` is the code, with '@set' where a set is concerned."""

    key: str
    count: int
    n: int

    @property
    def set(self) -> str:
        return self.key.partition("@")[2]

    def __str__(self) -> str:
        code = self.key.partition("@")[0].replace("_", " ")
        return f"{code}{f' on {self.set}' if self.set else ''} in {self.count} of {self.n} trials"


def tallies(findings: object) -> list[Tally]:
    """The column `findings` of one row of the comparison; none where it is missing."""
    found = re.findall(r"(.+?) (\d+)/(\d+)(?:; |$)", findings) if isinstance(findings, str) else []
    return [Tally(key, int(count), int(n)) for key, count, n in found]


def _footnote(tally: list[Tally]) -> str:
    both = Tally(tally[0].key, sum(each.count for each in tally), sum(each.n for each in tally))
    return str(both) if len(tally) == 1 else f"{both} of the {len(tally)} marked rows"


def _letter(index: int) -> str:
    high, low = divmod(index, len(LETTERS))
    return (_letter(high - 1) if high else "") + LETTERS[low]


def _places(row: Mapping[Hashable, Any]) -> dict[str, list[Tally]]:
    """The findings of a row by the entry that they mark, in reading order: the method's name, the mean of a domain's set."""
    by_set = {name: prefix for prefix in TITLES if isinstance(name := row[f"{prefix}_set"], str)}
    places: dict[str, list[Tally]] = {"method": [], **{prefix: [] for prefix in TITLES}}
    for each in tallies(row["findings"]):
        places[by_set.get(each.set, "method")].append(each)
    return places


def _entries(row: Mapping[Hashable, Any], letters: dict[str, str]) -> Iterator[Entry]:
    places = _places(row)

    def entry(text: str, place: str = "", order: float | str = "", numeric: bool = True, strong: bool = False) -> Entry:
        here = places.get(place, [])
        return Entry(text, ",".join(letters[each.key] for each in here), "; ".join(map(str, here)), order, numeric, strong)

    majority = row["method"] == MAJORITY
    yield entry("majority class" if majority else row["method"], "method", row["method"], numeric=False)
    yield entry("–" if majority else str(row["n_shots"]), order=float(row["n_shots"]))
    yield entry(row["pattern"] or "–", order=row["pattern"], numeric=False)
    unselected = "" if majority or not row["n_unselected"] else f" (+{row['n_unselected']})"  # finished, not under this rule
    yield entry("–" if majority else f"{row['n']}{unselected}", order=-1.0 if majority else float(row["n"]))
    yield entry("–" if majority else str(row["n_failed"]), order=-1.0 if majority else float(row["n_failed"]))
    for prefix in TITLES:
        mean, half_width = row[f"{prefix}_mean"], row[f"{prefix}_half_width"]
        yield entry(interval(mean, half_width), prefix, mean, strong=bool(row[f"{prefix}_top"]))
        yield entry(percent(row[f"{prefix}_sd"]), order=row[f"{prefix}_sd"])
        yield entry("–" if majority else percent(row[f"{prefix}_max"]), order=row[f"{prefix}_max"])
    yield entry(percent(row["gap_mean"], signed=True), order=row["gap_mean"])
