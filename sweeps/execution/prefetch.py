"""What a plan needs of the hub, fetched before the first trial: no trial waits for a download, and a later outage does no harm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmft import hub
from llmft.config import CustomTask, DataRef, ModelRef
from llmft.errors import UserError
from llmft.records import TrialRecord
from llmft.tasks import load_task
from sweeps.planning import Cell


@dataclass(frozen=True)
class Needs:
    """The models and the tasks' data of some cells that come from the hub; falsy if there are none."""

    models: tuple[ModelRef, ...]
    data: tuple[tuple[str, DataRef, CustomTask | None], ...]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Needs:
        bases = [cell.base for cell in cells]
        models = [model for base in bases for model in (base.model, base.teacher) if model and model.path is None]
        tasks = [(base.task, base.data, base.definition) for base in bases]
        tasks += [(name, other.data, other.definition) for base in bases for name, other in base.mixture.items()]
        return cls(
            models=tuple(dict.fromkeys(models)),
            data=tuple(dict.fromkeys(row for row in tasks if row[1].commits)),
        )

    def __bool__(self) -> bool:
        return bool(self.models or self.data)

    def __str__(self) -> str:
        return ", ".join([*(model.name for model in self.models), *(f"the rows of {task}" for task, *_ in self.data)])

    def fetch(self) -> list[Path]:
        """Fetch what this machine's cache lacks; gives the folder of each model.

        Raises:
            UserError: something cannot be fetched.
        """
        for task, data, definition in self.data:
            load_task(task, definition).load(data)
        return [hub.fetch_model(model.name, model.revision) for model in self.models]

    def are_here(self) -> bool:
        """Whether this machine's cache holds everything."""
        try:
            with hub.hub_access(offline=True):
                self.fetch()
        except UserError:
            return False
        return True


def moved_models(cells: Iterable[Cell], records: Iterable[TrialRecord]) -> list[str]:
    """A line for each hub model of which there are records at a commit that the plan does not mean (any more)."""
    meant = {(model.name, model.revision) for model in Needs.of(cells).models}
    now = dict(meant)
    known = {(record.spec.model.name, record.spec.model.revision) for record in records if record.spec.model.path is None}
    return [
        f"the results hold trials of {name} at commit {commit}, the plan means {now[name]}: its trials run anew. To go on with "
        f"the former, give the model as {{name: {name}, revision: {commit}}}"
        for name, commit in sorted(known - meant)
        if name in now
    ]
