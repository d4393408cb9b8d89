"""Tabulate how the numbers came about: seeds, search, settings, cost and provenance, as texts for the report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from analysis.frames import group_by
from analysis.tables.text_table import TextTable
from llmft.records import Manifest

if TYPE_CHECKING:
    import pandas as pd


_FACTS = {
    "shots_unit": "Unit of shots",
    "n_dev": "Dev examples that select",
    "verbalizer": "Verbalizer",
    "precision": "Precision",
    "data_seed": "Data seeds",
    "device": "Device",
}
_DOMAINS = {"in": "in domain", "out": "out of domain"}
_SHOWN = 8  # values of a fact that are listed; of more only some are


def facts(frame: pd.DataFrame, rule: str) -> list[tuple[str, str]]:
    """Return name and value of what the report trials have in common."""
    trials = _report(frame)
    stages = frame.drop_duplicates("digest")["stage"].value_counts()
    pairs = [("Checkpoint", rule), ("Trials", ", ".join(f"{count} {stage}" for stage, count in stages.items()))]
    for text in trials["sets"].dropna().unique():
        sets = json.loads(text).items()
        pairs.append(("Test sets", ", ".join(f"{name} ({shape['n']:,} rows, {_DOMAINS[shape['domain']]})" for name, shape in sets)))
    pairs += [(title, values(trials[column])) for column, title in _FACTS.items() if trials[column].notna().any()]
    hours = frame.drop_duplicates("digest")["wall_s"].sum() / 3600
    pairs.append(("Time, all trials", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"))
    return pairs


def search_table(manifest: Manifest | None) -> TextTable:
    """Show what the search chose: one row for each cell."""
    choices = manifest.choices if manifest else ()
    names = list(dict.fromkeys(name for choice in choices for name in choice.cell))
    table = TextTable(
        [*(name.removeprefix("n_") for name in names), "search trials", "dev score × 100", "chosen"],
        numeric=(len(names), len(names) + 1),
    )
    for choice in choices:
        dev = "–" if choice.dev_score is None else f"{100 * choice.dev_score:.1f}"
        chosen = ", ".join(f"{name} = {_short(value)}" for name, value in choice.params.items()) or "–"
        table.rows.append([*(_short(choice.cell.get(name, "–")) for name in names), str(choice.n_search_trials), dev, chosen])
    return table


def cost_table(frame: pd.DataFrame) -> TextTable:
    """Show the cost of a trial of each method: means over the finished report trials."""
    trials = _report(frame)
    headers = ["model", "method", "shots", "seconds", "peak memory, MB", "trained parameters", "stored, MB", "tokens per query"]
    table = TextTable(headers, numeric=tuple(range(2, len(headers))))
    done = trials[(trials["status"] == "finished") & trials["wall_s"].notna()]
    for (model, method, n_shots), group in group_by(done, ["model", "method", "n_shots"]):
        mean = group[["wall_s", "peak_memory_bytes", "n_trainable_parameters", "stored_bytes", "tokens_per_query"]].astype("float64").mean()
        memory, stored = f"{mean['peak_memory_bytes'] / 1e6:,.0f}", f"{mean['stored_bytes'] / 1e6:,.2f}"
        parameters, tokens = f"{mean['n_trainable_parameters']:,.0f}", f"{mean['tokens_per_query']:,.0f}"
        table.rows.append([model, method, str(n_shots), f"{mean['wall_s']:,.1f}", memory, parameters, stored, tokens])
    return table


def failure_table(frame: pd.DataFrame) -> TextTable:
    """List every failed trial and every unreadable record, of any stage."""
    rows = frame[frame["status"].isin(["failed", "unreadable"])].drop_duplicates("digest")
    columns = ["digest", "stage", "model", "task", "method", "n_shots", "data_seed", "cause", "message"]
    texts = rows[columns].astype("object").where(rows[columns].notna(), "–").astype("str")
    texts.loc[rows["status"] == "unreadable", "cause"] = "unreadable"
    return TextTable(
        ["digest", "stage", "model", "task", "method", "shots", "data seed", "cause", "message"],
        texts.to_numpy().tolist(),
        numeric=(5, 6),
    )


def provenance(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """List every entry of the report trials' provenance, nested names joined by dots, with all its values."""
    entries: dict[str, dict[str, None]] = {}
    for text in _report(frame)["provenance"].dropna().unique():
        for name, value in _flat(json.loads(text)):
            entries.setdefault(name, {})[_short(value)] = None
    return [(name, _list(list(texts))) for name, texts in sorted(entries.items())]


def values(column: pd.Series) -> str:
    """List the different values of a column, sorted."""
    return _list([str(value) for value in sorted(column.dropna().unique())])


def _report(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["stage"] == "report"].drop_duplicates("digest")


def _list(texts: list[str]) -> str:
    return ", ".join(texts) if len(texts) <= _SHOWN else f"{', '.join(texts[:3])}, … ({len(texts)} values, the last {texts[-1]})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries = []
    for name, value in content.items():
        entries += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return entries
