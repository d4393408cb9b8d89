"""The searches as Optuna studies, for optuna-dashboard and for whoever knows Optuna. A mirror: a sweep never reads from it.

By default it is a journal beside the results, `studies.log`; it may be any database that Optuna knows. There is one study for
each cell that is searched, and one trial in it for each point that has ended: complete, failed or pruned, never running. A trial
is written in one step, so that a sweep may be killed at any moment; the next one adds what is missing. What goes wrong here is
said in one line, and the sweep goes on without its mirror.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.errors import UserError
from sweeps.planning import Cell, distribution
from sweeps.search.cell_state import CellState, Point
from sweeps.search.optuna_search import PointOutcome

if TYPE_CHECKING:
    import optuna


JOURNAL_FILE = "studies.log"
LOCK_GRACE_S = 3
"""Optuna's lock on a journal is a file, which a killed process leaves behind; so long the next one waits for it."""

NAME_LENGTH = 480  # Optuna's tables hold 512 characters


class StudyExporter:
    """Keeps studies in step with a sweep.

    Args:
        root: the folder of results, in which the journal lies. Results at a URL (s3://...) have none.
        url: a database in place of the journal, as SQLAlchemy writes it (sqlite:///studies.db, postgresql://user@host/name).
        say: prints a line.

    Raises:
        UserError: `url` is none, or its driver is not installed.
    """

    def __init__(self, root: Path | str, url: str | None = None, say: Callable[[str], None] = print):
        self._say = say
        self._journal = None if url or "://" in str(root) else Path(root).absolute() / JOURNAL_FILE
        self._url = url and check_url(url)
        self._storage: optuna.storages.BaseStorage | None = None
        self._studies: dict[str, tuple[optuna.Study, set[str]]] = {}  # cell -> its study and the points in it
        self._seen: dict[str, CellState] = {}
        self._off = False

    def update(self, states: Iterable[CellState]) -> None:
        """Add the points that have ended since the last time. Cheap for states that are the same objects as before."""
        news = [state for state in states if state.points and self._seen.get(state.cell.key) is not state]
        if self._off or not news:
            return
        if not self._journal and not self._url:
            self._off = True
            self._say("Results at a URL have no journal of Optuna studies; to have the searches shown, name a database.")
            return
        try:
            self._storage = self._storage or self._open()
            for state in news:
                self._add_points(state)
                self._seen[state.cell.key] = state
        except Exception as error:  # whatever it is: the results do not hang on it
            self._off = True
            reason = " ".join(str(error).split())[:160]
            self._say(f"{self._journal or 'studies'}: the searches are not mirrored any more ({type(error).__name__}: {reason}).")

    def _open(self) -> optuna.storages.BaseStorage:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

        if self._journal is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            return optuna.storages.RDBStorage(self._url)
        lock = JournalFileSymlinkLock(str(self._journal), grace_period=LOCK_GRACE_S)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # that it has to wait for a dead process' lock is no news
        lock.acquire()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            _cut_torn_line(self._journal)
        finally:
            lock.release()
        try:
            return optuna.storages.JournalStorage(JournalFileBackend(str(self._journal), lock))
        except OSError:
            raise
        except Exception:
            aside = _set_aside(self._journal)
            self._say(f"{self._journal}: was damaged and is written anew from the records; the old file is {aside.name}.")
            return optuna.storages.JournalStorage(JournalFileBackend(str(self._journal), lock))

    def _add_points(self, state: CellState) -> None:
        ended = [point for point in state.points if point.outcome is not None]
        if ended and state.cell.key not in self._studies:
            study = self._study(state.cell)
            written = {_key(trial.state, trial.user_attrs.get("digests", ())) for trial in study.get_trials(deepcopy=False)}
            self._studies[state.cell.key] = study, written
        for point in ended:
            study, written = self._studies[state.cell.key]
            key = _key(_state(point.outcome), [trial.digest for trial in point.trials])
            if key not in written:
                study.add_trial(_trial(state.cell, point))
                written.add(key)

    def _study(self, cell: Cell) -> optuna.Study:
        """The cell's study under the cell's name; if a search of another kind has that, with a suffix of its own."""
        import optuna

        identity, name = _identity(cell), str(cell)[:NAME_LENGTH]
        taken = {study.study_name: study for study in self._storage.get_all_studies()}
        if (own := f"{name} [{identity}]") in taken or (name in taken and not self._is_of(taken[name], identity)):
            name = own
        study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)
        if "search" not in study.user_attrs:
            base = cell.base
            study.set_user_attr("search", identity)
            study.set_user_attr(
                "cell",
                {
                    "model": base.model.name, "task": base.task, "method": cell.entry, "n_shots": base.n_shots,
                    "pattern": base.pattern, "sampler": cell.search.sampler,
                },
            )  # fmt: skip
        return study

    def _is_of(self, study: Any, identity: str) -> bool:
        if "search" in study.user_attrs:
            return study.user_attrs["search"] == identity
        return self._storage.get_n_trials(study._study_id) == 0  # a sweep was killed before it could say


def check_url(url: str) -> str:
    """The URL of a database, if it can be one.

    Raises:
        UserError: it is none, or its driver is not installed.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(url).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        kind = url.partition("://")[0] if "://" in url else url
        raise UserError(
            f"studies: {kind!r} is no database that Optuna knows. Give sqlite:///FILE or postgresql://USER@HOST/NAME."
        ) from None
    except ImportError as error:
        kind = url.partition("://")[0]
        raise UserError(f"studies: {kind} needs the Python module {error.name!r}, which is not installed.") from None
    return url


def _identity(cell: Cell) -> str:
    """8 hexadecimal digits that tell searches with other points apart. A longer search goes on in the same study."""
    search = cell.search.model_dump(mode="json", exclude=None if cell.search.sampler == "grid" else {"n_trials"})
    content = {"cell": cell.key, "search": search, "ranges": {name: asdict(span) for name, span in cell.ranges.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _state(outcome: PointOutcome) -> optuna.trial.TrialState:
    from optuna.trial import TrialState

    if outcome.pruned:
        return TrialState.PRUNED
    return TrialState.FAIL if outcome.score is None else TrialState.COMPLETE


def _key(state: optuna.trial.TrialState, digests: Iterable[str]) -> str:
    """What a study holds once. A point that failed may come again, if it was tried again."""
    return " ".join([state.name, *digests])


def _trial(cell: Cell, point: Point) -> optuna.trial.FrozenTrial:
    import optuna

    outcome, causes = point.outcome, [record.cause for record in point.records]
    trial = optuna.trial.create_trial(
        state=_state(outcome),
        value=list(outcome.curve.values())[-1] if outcome.pruned and outcome.curve else outcome.score,
        params={name: _shown(value) for name, value in point.params.items()},
        distributions={name: _distribution(cell, name) for name in point.params},
        intermediate_values=outcome.curve,
        user_attrs={
            "round": point.round,
            "seeds": list(cell.search.seeds),
            "digests": [trial.digest for trial in point.trials],
            "dev_score": [record.dev_score.get(cell.selection) for record in point.records],
            **({"causes": causes} if any(causes) else {}),
        },
    )
    seconds = max((record.cost.wall_s for record in point.records if record.cost), default=0.0)
    trial.datetime_start = trial.datetime_complete - timedelta(seconds=seconds)
    return trial


def _distribution(cell: Cell, name: str) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution

    span = cell.ranges[name]
    return CategoricalDistribution([_shown(choice) for choice in span.choices]) if span.choices else distribution(span)


def _shown(value: Any) -> Any:
    """A value as Optuna can store it."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _cut_torn_line(journal: Path) -> None:
    """Remove what a killed process has begun to write: what is appended to half a line cannot be read."""
    if not journal.exists():
        return
    with open(journal, "r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _set_aside(journal: Path) -> Path:
    n = 1
    while (aside := journal.with_name(f"{journal.name}.damaged-{n}")).exists():
        n += 1
    os.replace(journal, aside)
    return aside
