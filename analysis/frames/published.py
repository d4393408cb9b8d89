"""Load published runs as a frame like that of one's own trials, so that both can stand in one table.

    frame = analysis.load_published()                     # Mosbach et al. 2023: one row a run and selection
    analysis.compare(frame, rule="best_in_domain")

The file says where the numbers come from (`published_runs/README.md`). They are single runs, not trials of ours: the number of a
run only counts the points of a plot, so it is no seed and tells no pairs, and nothing but scores is known of them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.frames.columns import trial_frame
from analysis.frames.loading import load
from llmft.config import ORACLES
from llmft.errors import UserError, nearest, unknown_name
from llmft.records import open_folder

if TYPE_CHECKING:
    import pandas as pd


SOURCES = {"mosbach2023": "Mosbach et al. 2023, arXiv 2305.16938v2"}
"""Name of a collection of published runs -> what it is."""

FOLDER = Path(__file__).parents[1] / "published_runs"

# Some runs recur in several figures. Each setting comes from the figure that shows most of it.
_PYTHIA, _METHODS, _MERGED = ["Fig16"], ["Fig6"], ["Fig14", "Fig15"]
_IN_CONTEXT, _PATTERN = ["Fig8", "Fig9", "Fig10"], ["Fig11", "Fig12", "Fig13"]

_SIZES = {"rte": 277, "mnli": 6692, "mnli-original": 9815, "qqp": 1000, "hans": 10_000, "paws-qqp": 677}
_MAJORITY = {"rte": 146 / 277, "mnli": 3479 / 6692, "mnli-original": 0.645, "qqp": 0.625, "hans": 0.5, "paws-qqp": 486 / 677}

_REPEATED = "the paper's panel of MNLI, minimal pattern, 32 shots repeats the one of the gpt-3 pattern"
_MACRO = "the published accuracy on PAWS-QQP is macro over labels here, and micro for fine-tuning: the two are not comparable"


def load_published(name: str = "mosbach2023") -> pd.DataFrame:
    """Load the published runs, each once.

    Args:
        name: one of `SOURCES`.

    Returns:
        The columns of `analysis.frames.columns.COLUMNS` and those of the sets. `method` is named as ours ('in_context', 'pattern',
        'vanilla';
        'pattern+lora' is the paper's variant of LoRA, so its `base_method` is 'lora'); `stage` is 'report'; the seeds are missing;
        `provenance` names the figure. Known slips of the paper are in `findings`.

    Raises:
        UserError: there is no such collection.
    """
    runs = _read(name)
    return trial_frame([_row(name, run) for run in runs[_canonical(runs)].to_dict("records")])


def published_settings(name: str = "mosbach2023") -> set[tuple[str, str]]:
    """Return (model, task) of every published run, without building their frame."""
    return set(_read(name)[["model", "task"]].itertuples(index=False, name=None))


def load_results(name: str) -> pd.DataFrame:
    """Load the published runs if `name` is one of `SOURCES`, else the trials of a folder or its URL."""
    if name in SOURCES:
        return load_published(name)
    if (near := nearest(name, SOURCES)) and not open_folder(name).exists():
        raise UserError(f"{name}: no such folder. Did you mean {near!r}?")
    return load(name)


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    if name not in SOURCES:
        raise unknown_name("collection of published runs", name, SOURCES)
    return pd.read_csv(FOLDER / f"{name}.csv.gz", dtype={"pattern": "str"}, keep_default_na=False, na_values=[""])


def _canonical(runs: pd.DataFrame) -> pd.Series:
    figure, opt, merged = runs["figure"], runs["model"].str.contains("opt-"), runs["task"] == "mnli-original"
    return (
        (figure.isin(_PYTHIA) & ~opt)
        | (figure.isin(_METHODS) & (runs["method"] != "pattern"))
        | (figure.isin(_MERGED) & merged)
        | (figure.isin(_IN_CONTEXT) & (runs["method"] == "in_context") & opt)
        | (figure.isin(_PATTERN) & (runs["method"] == "pattern") & opt & ~merged)
    )


def _row(name: str, run: Mapping[Hashable, Any]) -> dict[str, Any]:
    inside, outside = run["in_domain_accuracy"], run["out_of_domain_accuracy"]
    task, other, selection = run["task"], run["out_of_domain"], run["selection"]
    findings = list(_slips(run))
    where = [run[key] for key in ("model", "task", "method", "pattern", "shots", "run")]
    row = {
        "digest": "/".join(map(str, [name, *where])),
        "stage": "report",
        "status": "finished",
        "model": run["model"],
        "task": task,
        "method": run["method"],
        "base_method": run["method"].rpartition("+")[2],
        "n_shots": run["shots"],
        "shots_unit": "total",
        "pattern": run["pattern"],
        "selection": selection,
        "is_oracle": selection in ORACLES,
        "metric": "accuracy",
        "findings": ";".join(finding["code"] for finding in findings) or None,
        "finding_details": json.dumps(findings) if findings else None,
        "n_warnings": len(findings),
        "sets": json.dumps({set_: {"domain": d, "n": _SIZES[set_], "groups": {}} for set_, d in ((task, "in"), (other, "out"))}),
        "gap": inside - outside,
        "provenance": json.dumps({"published": SOURCES[name], "figure": run["figure"].removeprefix("Fig"), "run": run["run"]}),
    }
    for prefix, set_, score in (("in_domain", task, inside), ("out_of_domain", other, outside)):
        row |= {f"{prefix}_set": set_, f"{prefix}_majority": _MAJORITY[set_]}
        row |= {f"{prefix}_score": score, f"{prefix}_accuracy": score, f"{set_}_score": score, f"{set_}_accuracy": score}
    return row


def _slips(run: Mapping[Hashable, Any]) -> Iterator[dict[str, Any]]:
    """The findings on runs whose published numbers are known to be wrong or not comparable."""
    if run["method"] == "in_context":
        if (run["task"], run["pattern"], run["shots"]) == ("mnli", "minimal", 32):
            yield _finding("published_slip", _REPEATED)
        if run["out_of_domain"] == "paws-qqp":
            yield _finding("published_slip", _MACRO, run["out_of_domain"])


def _finding(code: str, message: str, set_: str | None = None) -> dict[str, Any]:
    return {"code": code, "severity": "warning", "message": message, "set": set_, "selection": None, "value": None}
