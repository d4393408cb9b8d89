"""Format the comparison: percentages with one decimal, intervals, p-values, findings as letters that point to footnotes."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.frames import group_by
from analysis.stats import FEWEST, MAJORITY, Difference

if TYPE_CHECKING:
    import pandas as pd


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
        """The columns without information: one pattern for all, no failed trial."""
        columns = {header: i for i, header in enumerate(self.headers)}
        one_pattern = len({row[columns["Pattern"]].text for row in self.rows} - {"–"}) < 2
        no_failures = all(row[columns["Failed"]].text in ("0", "–") for row in self.rows)
        return ({columns["Pattern"]} if one_pattern else set()) | ({columns["Failed"]} if no_failures else set())

    @property
    def spread(self) -> set[int]:
        """The columns of the standard deviation and the maximum; the interval stands beside the mean."""
        return {i for i, header in enumerate(self.headers) if header in ("sd", "max")}


def build_blocks(comparison: pd.DataFrame) -> tuple[list[Block], dict[str, str]]:
    """Turn the comparison into blocks of texts, one for each model and task, and footnotes (letter -> text).

    A finding marks the number it concerns: the mean of its set, or the method's name where it concerns the trial or another set.
    """
    marked = [tally for row in comparison.to_dict("records") for entry in _tallies_by_entry(row).values() for tally in entry]
    letters = {key: letter(i, LETTERS) for i, key in enumerate(dict.fromkeys(tally.key for tally in marked))}
    footnotes = {mark: _footnote([tally for tally in marked if tally.key == key]) for key, mark in letters.items()}
    blocks = []
    for (model, task), rows in group_by(comparison, ["model", "task"], sort=False):
        oracle = " (oracle)" if rows["is_oracle"].any() else ""
        headers = ["Method", "Shots", "Pattern", "n", "Failed"]
        for prefix, title in TITLES.items():
            name = ", ".join(rows[f"{prefix}_set"].dropna().unique())
            headers += [f"{title}{f': {name}' if name else ''}{oracle}", "sd", "max"]
        entries = [list(_entries(row, letters)) for row in rows.to_dict("records")]
        blocks.append(Block(model, task, metric_name(rows["metric"]), [*headers, "Gap"], entries))
    return blocks, footnotes


def percent(value: float, signed: bool = False) -> str:
    """Format a share in [0, 1] as a percentage with one decimal and a true minus sign; a dash for a missing one."""
    if math.isnan(value):
        return "–"
    return f"{round(100 * value, 1) + 0.0:{'+' if signed else ''}.1f}".replace("-", "−")


def unit(metric: object) -> str:
    """Return the unit of a score that is shown times 100: ' %' for shares, nothing for other metrics (ROUGE, BLEU)."""
    return " %" if metric in SHARES else ""


def axis_name(trials: pd.DataFrame, domain: str) -> str:
    """Name an axis with the scores of a domain: 'in domain: rte, accuracy in %'."""
    name = next(iter(trials[f"{domain}_set"].dropna()), "")
    return f"{TITLES[domain].lower()}{f': {name}' if name else ''}, {metric_name(trials['metric'])}"


def metric_name(metrics: pd.Series) -> str:
    """Name the metrics of some rows: 'accuracy in %', 'rougeL × 100'; several where the rows mix them."""
    names = list(dict.fromkeys(metrics.dropna())) or ["accuracy"]
    return ", ".join(f"{name.replace('_', ' ')} in %" if unit(name) else f"{name} × 100" for name in names)


def interval(mean: float, half_width: float) -> str:
    """Format a mean with its interval: '61.2 ± 3.1'; the mean alone where there is no interval."""
    return percent(mean) + ("" if math.isnan(half_width) else f" ± {percent(half_width)}")


def p_text(p: float) -> str:
    """Format a p-value: 'p = .03', 'p < .001', 'p = 1'; 'not tested' where it is not defined."""
    if math.isnan(p):
        return "not tested"
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("0.", ".", 1) if p < 0.995 else "p = 1"


def p_entry(p: float, n: int) -> str:
    """Format a p-value for a table: '.03', '< .001'; a dash where `n` trials are too few to test."""
    return "–" if n < FEWEST or math.isnan(p) else p_text(p).removeprefix("p ").removeprefix("= ")


def span(difference: Difference) -> str:
    """Format an interval: '0.4 to 4.2'; empty where there are too few trials for one, or no spread."""
    _, low, high, _, n, _ = difference
    return f"{percent(low)} to {percent(high)}" if n >= FEWEST and high - low > 1e-12 else ""


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
    """Parse the column `findings` of one row of the comparison; empty where it is missing."""
    matches = re.findall(r"(.+?) (\d+)/(\d+)(?:; |$)", findings) if isinstance(findings, str) else []
    return [Tally(key, int(count), int(n)) for key, count, n in matches]


def _footnote(marked: list[Tally]) -> str:
    total = Tally(marked[0].key, sum(tally.count for tally in marked), sum(tally.n for tally in marked))
    return str(total) if len(marked) == 1 else f"{total} of the {len(marked)} marked rows"


def letter(index: int, letters: str) -> str:
    """Return the letters of a footnote or group by its index, as spreadsheets name their columns: a, b, ..., z, aa, ab, ..."""
    high, low = divmod(index, len(letters))
    return (letter(high - 1, letters) if high else "") + letters[low]


def _tallies_by_entry(row: Mapping[Hashable, Any]) -> dict[str, list[Tally]]:
    """Sort the findings of a row by the entry that they mark, in reading order: the method's name, the mean of a domain's set."""
    by_set = {name: prefix for prefix in TITLES if isinstance(name := row[f"{prefix}_set"], str)}
    by_entry: dict[str, list[Tally]] = {"method": [], **{prefix: [] for prefix in TITLES}}
    for tally in tallies(row["findings"]):
        by_entry[by_set.get(tally.set, "method")].append(tally)
    return by_entry


def _entries(row: Mapping[Hashable, Any], letters: dict[str, str]) -> Iterator[Entry]:
    by_entry = _tallies_by_entry(row)

    def entry(text: str, name: str = "", order: float | str = "", numeric: bool = True, strong: bool = False) -> Entry:
        marked = by_entry.get(name, [])
        return Entry(text, ",".join(letters[tally.key] for tally in marked), "; ".join(map(str, marked)), order, numeric, strong)

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
