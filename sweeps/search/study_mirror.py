"""Export the searches as Optuna studies, for optuna-dashboard and for whoever knows Optuna. A sweep never reads them.

There is one study for each cell that is searched, and one trial in it for each point that has ended: complete, failed or pruned. They
lie in a journal beside the results or in a database. A damaged journal is set aside, and written anew from the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.errors import UserError
from sweeps.planning import Cell, distribution
from sweeps.search.cell_state import CellState, Point
from sweeps.search.optuna_search import PointOutcome

if TYPE_CHECKING:
    import optuna

JOURNAL_FILE = "studies.log"


class StudyExporter:
    """Keep studies in step with a sweep, the only one that writes them. After an error the sweep goes on without.

    Args:
        root: the folder of results, in which the journal lies. Results at a URL (s3://...) have none.
        url: a database in place of the journal, as SQLAlchemy writes it (sqlite:///studies.db, postgresql://user@host/name).
        say: prints a line.

    Raises:
        UserError: `url` is none, or its driver is not installed.
    """

    def __init__(self, root: Path | str, url: str | None = None, say: Callable[[str], None] = print):
        self._say, self._url = say, url and check_url(url)
        self._journal = None if url or "://" in str(root) else Path(root).absolute() / JOURNAL_FILE
        self._storage: optuna.storages.BaseStorage | None = None
        self._studies: dict[str, tuple[optuna.Study, set[str]]] = {}  # cell -> its study and the keys of the points in it
        self._exported: dict[str, CellState] = {}
        self._off = False

    def update(self, states: Iterable[CellState]) -> None:
        """Add the points that have ended since the last time. Cheap for states that are the same objects as before."""
        changed = [state for state in states if state.points and self._exported.get(state.cell.key) is not state]
        if self._off or not changed:
            return
        try:
            if self._storage is None and (self._journal or self._url):
                self._storage = _open_journal(self._journal, self._say) if self._journal else _open_database(self._url or "")
            if self._storage is None:
                self._off = True
                self._say("Results at a URL have no journal of Optuna studies; to have the searches shown, name a database.")
                return
            for state in changed:
                for point in state.points:
                    if point.outcome is not None:
                        self._add(self._storage, state.cell, point, point.outcome)
                self._exported[state.cell.key] = state
        except Exception as error:  # whatever it is: the results do not depend on it
            self._off = True
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            self._say(f"{self._journal or 'studies'}: the searches are not mirrored any more ({text}).")

    def _add(self, storage: optuna.storages.BaseStorage, cell: Cell, point: Point, outcome: PointOutcome) -> None:
        if cell.key not in self._studies:
            study = _study_of(storage, cell)
            self._studies[cell.key] = study, set(map(_key, study.get_trials(deepcopy=False)))
        (study, keys), trial = self._studies[cell.key], _trial(cell, point, outcome)
        if _key(trial) not in keys:
            study.add_trial(trial)
            keys.add(_key(trial))


def check_url(url: str) -> str:
    """Return `url`, or raise a UserError if it is no database that SQLAlchemy knows or its driver is not installed."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    kind, known = url.partition("://")[0], "Give sqlite:///FILE or postgresql://USER@HOST/NAME."
    try:
        make_url(url).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        raise UserError(f"studies: {kind!r} is no database that Optuna knows. {known}") from None
    except ImportError as error:
        raise UserError(f"studies: {kind} needs the Python module {error.name!r}, which is not installed.") from None
    return url


def _open_database(url: str) -> optuna.storages.BaseStorage:
    from optuna.storages import RDBStorage

    return RDBStorage(url)


def _open_journal(path: Path, say: Callable[[str], None]) -> optuna.storages.BaseStorage:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a killed process: the folder's lock keeps other sweeps out
    try:
        if path.exists() and not (path.read_bytes() or b"\n").endswith(b"\n"):
            raise ValueError("the last line was not written to its end")
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError:
        raise
    except Exception:  # Optuna raises what reading a damaged line happens to raise
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        say(f"{path}: was damaged and is written anew from the records; the old file is {aside.name}.")
        return JournalStorage(JournalFileBackend(str(path)))


def _study_of(storage: optuna.storages.BaseStorage, cell: Cell) -> optuna.Study:
    """Load or create the study of a cell. Searches of other points have another name; a longer search goes on in the same study."""
    import optuna

    assert cell.search
    search = cell.search.model_dump(mode="json", exclude=None if cell.search.sampler == "grid" else {"n_trials"})
    content = {"cell": cell.key, "search": search, "ranges": {name: asdict(span) for name, span in cell.ranges.items()}}
    identity = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name, base = f"{str(cell)[:480]} [{identity}]", cell.base  # Optuna's tables hold 512 characters
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    if not study.user_attrs:
        names = {"model": base.model.name, "task": base.task, "method": cell.entry, "n_shots": base.n_shots, "pattern": base.pattern}
        study.set_user_attr("cell", names | {"sampler": cell.search.sampler})
    return study


def _key(trial: optuna.trial.FrozenTrial) -> str:
    """Identify what a study holds once. A point that failed may come again, if it was tried again."""
    return " ".join([trial.state.name, *trial.user_attrs.get("digests", ())])


def _trial(cell: Cell, point: Point, outcome: PointOutcome) -> optuna.trial.FrozenTrial:
    from optuna.trial import TrialState, create_trial

    records = [record for record in point.records if record]
    causes = [record.cause for record in records]
    attributes = {
        "round": point.round,
        "seeds": [trial.spec.data_seed for trial in point.trials],
        "digests": [trial.digest for trial in point.trials],
        "dev_score": [record.dev_score.get(cell.selection) for record in records],
    }
    trial = create_trial(
        state=TrialState.PRUNED if outcome.pruned else TrialState.FAIL if outcome.score is None else TrialState.COMPLETE,
        value=list(outcome.curve.values())[-1] if outcome.pruned and outcome.curve else outcome.score,
        params={name: _storable(value) for name, value in point.params.items()},
        distributions={name: _distribution(cell, name) for name in point.params},
        intermediate_values=outcome.curve,
        user_attrs=attributes | ({"causes": causes} if any(causes) else {}),
    )
    seconds = max((record.cost.wall_s for record in records if record.cost), default=0.0)
    trial.datetime_start = (trial.datetime_complete or datetime.now()) - timedelta(seconds=seconds)
    return trial


def _distribution(cell: Cell, name: str) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution

    span = cell.ranges[name]
    return CategoricalDistribution([_storable(choice) for choice in span.choices]) if span.choices else distribution(span)


def _storable(value: Any) -> Any:
    """Convert a value to one that Optuna can store."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
