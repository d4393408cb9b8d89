"""What the sweep says about its own store: which trials are reported, which only searched, and what the search chose."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmft.errors import UserError
from llmft.files import Place, open_folder, reason

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


class Manifest(_Data):
    """`RESULTS/sweep.json`. `report` and `search` are digests; `entries` maps those of a renamed method to its name in the plan."""

    plan_name: str = ""
    report: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    entries: dict[str, str] = Field(default_factory=dict)
    choices: tuple[Choice, ...] = ()

    def stages(self) -> dict[str, str]:
        """digest -> 'report' or 'search'. A trial in both lists is reported."""
        return dict.fromkeys(self.search, "search") | dict.fromkeys(self.report, "report")


def read_manifest(root: str | Place) -> Manifest | None:
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
