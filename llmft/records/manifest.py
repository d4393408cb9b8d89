"""The manifest of a sweep: its cells, which records belong to them, and what its searches chose. The store writes it, reports read it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmft.errors import UserError
from llmft.records.storage import StoragePath, open_folder, reason

MANIFEST_FILE = "sweep.json"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a later version may write more


class SearchChoice(_Data):
    """The hyper-parameters that the search chose for one cell.

    Attributes:
        cell: its name (model, task, method, n_shots, pattern, settings).
        params: the chosen values; empty if the search `failed`.
        dev_score: mean score of the chosen point over the search seeds, in [0, 1].
        n_points, n_search_trials, n_pruned_points: how many points and trials the search took, and how many points it pruned.
    """

    cell: dict[str, Any]
    params: dict[str, Any] = Field(default_factory=dict)
    failed: bool = False
    dev_score: float | None = None
    n_points: int = 0
    n_search_trials: int = 0
    n_pruned_points: int = 0


class PlannedCell(_Data):
    """A cell of the plan. `n_report` trials are to be reported (0: its search failed); `report` are their digests, once known."""

    cell: dict[str, Any]
    n_report: int
    report: tuple[str, ...] = ()


class Manifest(_Data):
    """`RESULTS/sweep.json`. `report` and `search` are digests; `entries` maps those of a renamed method to its name in the plan."""

    plan_name: str = ""
    cells: tuple[PlannedCell, ...] = ()
    report: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    entries: dict[str, str] = Field(default_factory=dict)
    choices: tuple[SearchChoice, ...] = ()

    def stages(self) -> dict[str, str]:
        """Map each digest to 'report' or 'search'; a trial in both lists is reported."""
        return dict.fromkeys(self.search, "search") | dict.fromkeys(self.report, "report")

    @property
    def n_report(self) -> int:
        """Number of trials that the plan reports, with those whose hyper-parameters the search has yet to choose."""
        return len(set(self.report)) + sum(cell.n_report - len(cell.report) for cell in self.cells)

    def unfinished(self, model: str, task: str, recorded: Collection[str]) -> str:
        """Say what is still to come: 'Not finished: 9 of 12 cells have no reported trials yet (...)'; empty if nothing is.

        Args:
            recorded: digests of the trials that have a record.
        """
        cells = [cell for cell in self.cells if (cell.cell.get("model"), cell.cell.get("task")) == (model, task)]
        n_recorded = [sum(digest in recorded for digest in cell.report) for cell in cells]
        absent = [cell for cell, n in zip(cells, n_recorded, strict=True) if cell.n_report and not n]
        n_begun = sum(0 < n < cell.n_report for cell, n in zip(cells, n_recorded, strict=True))
        if not absent and not n_begun:
            return ""
        seen = {cell.cell.get("method") for cell, n in zip(cells, n_recorded, strict=True) if n}
        methods = dict.fromkeys(str(cell.cell.get("method")) for cell in absent if cell.cell.get("method") not in seen)
        parts = [f"{len(absent)} of {len(cells)} cells have no reported trials yet"] if absent else []
        if methods:
            parts[0] += f" (none at all of {', '.join(methods)})"
        if n_begun:
            parts.append(f"{n_begun}{'' if absent else f' of {len(cells)} cells'} only some of theirs")
        return f"Not finished: {', '.join(parts)}; what follows may change."


def read_manifest(root: str | StoragePath) -> Manifest | None:
    """Read the manifest of the results in `root`; None if there is none (every trial is then reported).

    Raises:
        UserError: the file is there and cannot be read.
    """
    path = open_folder(root) / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        problem = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        where = ".".join(str(part) for part in problem["loc"]) if problem else ""
        text = f"{where}: {problem['msg']}" if where else problem["msg"] if problem else reason(error)
        raise UserError(f"{path}: not a readable manifest ({text}). Run the plan again: it writes the file anew.") from error
