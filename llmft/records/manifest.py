"""What the sweep says about its own store: what it plans, which trials are reported, which only searched, what the search chose."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmft.errors import UserError
from llmft.records.storage import StoragePath, open_folder, reason

MANIFEST_FILE = "sweep.json"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a sweep may say more than the analysis reads


class Choice(_Data):
    """The hyper-parameters that the search chose for one cell.

    `cell` names it (model, task, method, n_shots, pattern, ...); `dev_score` is the winner's on the search seeds, [0, 1].
    """

    cell: dict[str, Any]
    params: dict[str, Any] = Field(default_factory=dict)
    dev_score: float | None = None
    n_search_trials: int = 0


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
    choices: tuple[Choice, ...] = ()

    def stages(self) -> dict[str, str]:
        """digest -> 'report' or 'search'. A trial in both lists is reported."""
        return dict.fromkeys(self.search, "search") | dict.fromkeys(self.report, "report")

    @property
    def n_report(self) -> int:
        """How many trials the plan reports, those included that the search has still to settle."""
        return len(set(self.report)) + sum(each.n_report - len(each.report) for each in self.cells)

    def unfinished(self, model: str, task: str, recorded: Collection[str]) -> str:
        """'Not finished: 9 of 12 cells have no reported trials yet (...)': what is still to come; empty where all is there.

        Args:
            recorded: digests of the trials that have a record.
        """
        cells = [each for each in self.cells if (each.cell.get("model"), each.cell.get("task")) == (model, task)]
        there = {id(each): sum(digest in recorded for digest in each.report) for each in cells}
        absent = [each for each in cells if each.n_report and not there[id(each)]]
        n_begun = sum(0 < there[id(each)] < each.n_report for each in cells)
        if not absent and not n_begun:
            return ""
        seen = {each.cell.get("method") for each in cells if there[id(each)]}
        methods = dict.fromkeys(str(each.cell.get("method")) for each in absent if each.cell.get("method") not in seen)
        said = [f"{len(absent)} of {len(cells)} cells have no reported trials yet"] if absent else []
        if methods:
            said[0] += f" (none at all of {', '.join(methods)})"
        if n_begun:
            said.append(f"{n_begun}{'' if absent else f' of {len(cells)} cells'} only some of theirs")
        return f"Not finished: {', '.join(said)}; what follows may change."


def read_manifest(root: str | StoragePath) -> Manifest | None:
    """The manifest of the results in `root`; None where the sweep left none (then every trial is reported).

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
