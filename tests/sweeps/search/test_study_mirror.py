"""The mirror of the searches in Optuna studies, read back with Optuna's own API."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from support.fakes import fake_record
from support.schedules import finish, honest, searched_cells, undisturbed

from llmft.errors import Cause, UserError
from sweeps.search.schedule import RecordBook, Schedule
from sweeps.search.study_mirror import JOURNAL_FILE, StudyExporter

NAME = "fake toy lora 2 shots (minimal)"


@pytest.fixture(params=["journal", "sqlite"])
def place(request, tmp_path):
    """Arguments of a mirror, and what reads it as a stranger would."""
    if request.param == "journal":
        return {"root": tmp_path}, lambda: JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL_FILE)))
    url = f"sqlite:///{tmp_path}/studies.db"
    return {"root": tmp_path, "url": url}, lambda: RDBStorage(url)


def journal(root):
    return JournalStorage(JournalFileBackend(str(root / JOURNAL_FILE)))


def rows_of(storage, name):
    """The trials of a study in a form to compare: state, value, curve and digests."""
    return sorted(
        (trial.state.name, trial.value, sorted(trial.intermediate_values.items()), trial.user_attrs["digests"])
        for trial in optuna.load_study(study_name=name, storage=storage).get_trials()
    )


def content(storage):
    """cell -> the trials of its study, where each cell has one."""
    names = optuna.get_all_study_names(storage)
    cells = {name.rpartition(" [")[0]: rows_of(storage, name) for name in names}
    assert len(cells) == len(names)
    return cells


def study_of(cell, storage):
    (name,) = [name for name in optuna.get_all_study_names(storage) if name.startswith(f"{cell} [")]
    return optuna.load_study(study_name=name, storage=storage)


def expected(states):
    cells = {}
    for state in states:
        cells[str(state.cell)] = rows = []
        for point in state.points:
            outcome, last = point.outcome, list(point.outcome.curve.values())[-1:] or [None]
            kind = "PRUNED" if outcome.pruned else "FAIL" if outcome.score is None else "COMPLETE"
            value = last[0] if outcome.pruned else outcome.score
            rows.append((kind, value, sorted(outcome.curve.items()), [trial.digest for trial in point.trials]))
        rows.sort()
    return cells


def failing(trial):
    dead = trial.spec.train.learning_rate == 1e-2 and trial.spec.data_seed == 101
    return fake_record(trial.spec, Cause.DIVERGED) if dead else honest(trial)


def test_every_point_is_there_once_as_it_ended(place):
    where, read = place
    cells, book = searched_cells("tpe", "median"), RecordBook()
    schedule, said = Schedule(cells), []
    for seed in range(4):  # three times a new mirror finds what is there
        mirror = StudyExporter(**where, say=said.append)

        def run(trial, mirror=mirror):
            mirror.update(schedule.states(book))
            return failing(trial)

        finish(schedule, book, random.Random(seed), run=run, stop_after=25 if seed < 3 else None)
        mirror.update(schedule.states(book))
    states = schedule.states(book)
    assert content(read()) == expected(states) and said == []
    kinds = {kind for rows in content(read()).values() for kind, *_ in rows}
    assert kinds == {"COMPLETE", "FAIL", "PRUNED"}
    for state in states:
        study = study_of(state.cell, read())
        assert study.best_value == state.choice.dev_score
        equals = [point.params for point in state.points if point.outcome.score == study.best_value]  # Optuna knows nothing of losses
        assert study.best_params in equals and state.choice.params in equals
        assert study.user_attrs["cell"]["method"] == state.cell.entry
        by_digests = {tuple(trial.user_attrs["digests"]): trial for trial in study.get_trials()}
        for point in state.points:
            trial = by_digests[tuple(planned.digest for planned in point.trials)]
            assert trial.params == point.params and trial.user_attrs["round"] == point.round
            assert trial.user_attrs["seeds"] == [100, 101]
            assert trial.user_attrs["dev_score"] == [record.dev_score.get("best_dev") for record in point.records]
            causes = [record.cause for record in point.records]
            assert trial.user_attrs.get("causes", [None, None]) == causes


def test_choices_that_optuna_cannot_hold_are_written_as_text(small_cells, tmp_path):
    _, cells = small_cells(("r: {choices: [2, 4]}", "targets: {choices: [[a], [a, b]]}, clip_norm: {choices: [null, 1.0]}"))
    records = finish(Schedule(cells), {}, random.Random(0))
    StudyExporter(tmp_path).update(Schedule(cells).states(records))
    params = [trial.params for trial in study_of("fake toy lora 4 shots (minimal)", journal(tmp_path)).get_trials()]
    assert len(params) == 4 and {value["targets"] for value in params} <= {"[]", '["a"]', '["a", "b"]'}
    assert {value["clip_norm"] for value in params} <= {None, 1.0}


def test_a_search_with_other_points_gets_a_study_of_its_own(place):
    where, read = place
    for rule in ("median", None, "median"):
        StudyExporter(**where).update(Schedule(searched_cells("tpe", rule)).states(undisturbed("tpe", rule)[0]))
    studies = {name: rows_of(read(), name) for name in optuna.get_all_study_names(read())}
    assert len(studies) == 4 and {len(rows) for rows in studies.values()} == {16}
    with_pruning = expected(Schedule(searched_cells("tpe", "median")).states(undisturbed("tpe", "median")[0]))
    without = expected(Schedule(searched_cells("tpe", None)).states(undisturbed("tpe", None)[0]))
    both = [rows for name, rows in studies.items() if name.startswith(f"{NAME} [")]
    assert sorted(both) == sorted([with_pruning[NAME], without[NAME]])


def test_a_longer_search_goes_on_in_its_study(small_cells, tmp_path):
    for n_trials in (4, 6):
        _, cells = small_cells(("n_trials: 4", f"n_trials: {n_trials}"))
        StudyExporter(tmp_path).update(Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0))))
        assert {name: len(rows) for name, rows in content(journal(tmp_path)).items()} == {
            f"fake toy lora {shots} shots (minimal)": n_trials for shots in (2, 4)
        }


def test_a_point_that_was_tried_again_is_there_in_both_ways(small_cells, tmp_path):
    _, cells = small_cells()
    records = finish(Schedule(cells), {}, random.Random(0))
    point = Schedule(cells).states(records)[-1].points[-1]
    mended = records[point.trials[0].digest]
    records[mended.digest] = fake_record(mended.spec, Cause.CRASHED)
    StudyExporter(tmp_path).update(Schedule(cells).states(records))
    records[mended.digest] = mended
    for _ in range(2):
        StudyExporter(tmp_path).update(Schedule(cells).states(records))
    rows = [row for row in content(journal(tmp_path))["fake toy lora 4 shots (minimal)"] if mended.digest in row[3]]
    assert [kind for kind, *_ in rows] == ["COMPLETE", "FAIL"]


def test_a_journal_with_a_torn_last_line_is_written_anew(small_cells, tmp_path):
    _, cells = small_cells()
    states = Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0)))
    StudyExporter(tmp_path).update(states)
    path, said = tmp_path / JOURNAL_FILE, []
    whole, complete = path.read_bytes(), content(journal(tmp_path))
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, (last + len(whole)) // 2, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        StudyExporter(tmp_path, say=said.append).update(states)
        assert content(journal(tmp_path)) == complete and "was damaged and is written anew" in said.pop()


@pytest.mark.parametrize("damage", [b"\x00" * 100 + b"\n", b'{"op_code":4,"worker_id":"x"}\n', b'{"op_code": 99}\n'])
def test_a_damaged_journal_is_kept_aside_and_written_anew(small_cells, tmp_path, damage):
    _, cells = small_cells()
    states = Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0)))
    StudyExporter(tmp_path).update(states)
    path, said = tmp_path / JOURNAL_FILE, []
    complete, lines = content(journal(tmp_path)), path.read_bytes().splitlines(keepends=True)
    for n in (1, 2):
        path.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
        damaged = path.read_bytes()
        StudyExporter(tmp_path, say=said.append).update(states)
        assert content(journal(tmp_path)) == complete and len(said) == n and "was damaged" in said[-1]
        assert (tmp_path / f"{JOURNAL_FILE}.damaged").read_bytes() == damaged


KILLED = """
import random, sys, time
from pathlib import Path
from sweeps.search.schedule import RecordBook, Schedule
from sweeps.search.study_mirror import StudyExporter
from support.schedules import finish, honest, searched_cells

book, schedule, mirror = RecordBook(), Schedule(searched_cells("random", "median")), StudyExporter(Path(sys.argv[1]))
print("ready", flush=True)
def run(trial):
    mirror.update(schedule.states(book))
    return honest(trial)
finish(schedule, book, random.Random(0), run=run)
mirror.update(schedule.states(book))
print("done", flush=True)
time.sleep(60)
"""


def test_killed_at_any_moment_nothing_is_lost_doubled_or_left_running(tmp_path):
    states = Schedule(searched_cells("random", "median")).states(undisturbed("random", "median")[0])
    rng, size = random.Random(0), 0
    for after in (0.002, 0.02, 0.1):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        path = tmp_path / JOURNAL_FILE
        deadline = time.monotonic() + 20  # on a busy machine the process before may have written everything
        while (not path.exists() or path.stat().st_size <= size) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(after * rng.uniform(0.5, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        size = path.stat().st_size
        rows = [(name, *row) for name, rows in content(journal(tmp_path)).items() for row in rows]  # two studies may share a point
        assert len({repr(row) for row in rows}) == len(rows) and "RUNNING" not in {kind for _, kind, *_ in rows}
    StudyExporter(tmp_path).update(states)
    assert content(journal(tmp_path)) == expected(states)


def test_a_lock_that_a_killed_process_left_is_taken_over(small_cells, tmp_path, capfd):
    _, cells = small_cells()
    states = Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0)))
    (tmp_path / f"{JOURNAL_FILE}.lock").symlink_to(tmp_path / JOURNAL_FILE)
    (tmp_path / JOURNAL_FILE).touch()
    started, said = time.perf_counter(), []
    StudyExporter(tmp_path, say=said.append).update(states)
    assert time.perf_counter() - started < 10 and said == [] and capfd.readouterr() == ("", "")
    assert len(content(journal(tmp_path))) == 2


def test_a_full_disk_ends_the_mirror_and_nothing_else(tmp_path):
    cells, (records, _) = searched_cells("random", "median"), undisturbed("random", "median")
    states, said = Schedule(cells).states(records), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, limits[1]))
        mirror = StudyExporter(tmp_path, say=said.append)
        mirror.update(states)
        mirror.update(Schedule(cells).states(records))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(said) == 1 and "\n" not in said[0] and "are not mirrored any more (OSError" in said[0]
    assert not (tmp_path / JOURNAL_FILE).read_bytes().endswith(b"\n")  # a line was torn
    StudyExporter(tmp_path, say=said.append).update(states)
    assert content(journal(tmp_path)) == expected(states) and len(said) == 2 and "was damaged" in said[1]


def test_a_database_that_goes_away_ends_the_mirror_and_nothing_else(tmp_path, capfd):
    cells, (records, _) = searched_cells("random", None), undisturbed("random", None)
    database, said = tmp_path / "gone" / "studies.db", []
    half = {digest: record for digest, record in records.items() if digest < "8"}
    StudyExporter(tmp_path, f"sqlite:///{database}", said.append).update(Schedule(cells).states(records))
    assert len(said) == 1 and "not mirrored any more" in said[0] and not list(tmp_path.iterdir())
    database.parent.mkdir()
    mirror = StudyExporter(tmp_path, f"sqlite:///{database}", said.append)
    mirror.update(Schedule(cells).states(half))
    database.write_bytes(b"no database")
    mirror.update(Schedule(cells).states(records))
    mirror.update(Schedule(cells).states(records))
    assert len(said) == 2 and "not mirrored any more" in said[1] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("studies.db", "'studies.db' is no database that Optuna knows"),
        ("oracel://user:secret@host/x", "'oracel' is no database"),
        ("mysql+nodriver://user:secret@host/x", "is no database"),
    ],
)
def test_a_url_that_is_none_is_a_mistake(tmp_path, url, said):
    with pytest.raises(UserError, match=said) as caught:
        StudyExporter(tmp_path, url)
    assert "secret" not in str(caught.value)


def test_results_at_a_url_have_no_journal(small_cells, tmp_path):
    _, cells = small_cells()
    states, said = Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0))), []
    mirror = StudyExporter("s3://bucket/results", say=said.append)
    mirror.update(states)
    mirror.update(Schedule(cells).states({}))
    assert len(said) == 1 and "no journal" in said[0]
    StudyExporter("s3://bucket/results", f"sqlite:///{tmp_path}/x.db", said.append).update(states)
    assert len(content(RDBStorage(f"sqlite:///{tmp_path}/x.db"))) == 2 and len(said) == 1


def test_nothing_is_said_or_made_where_nothing_is_searched(small_cells, tmp_path):
    _, cells = small_cells(("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null"))
    said = []
    for root in (tmp_path, "s3://bucket/results"):
        StudyExporter(root, say=said.append).update(Schedule(cells).states({}))
    assert said == [] and not (tmp_path / JOURNAL_FILE).exists()


def test_the_journal_is_plain_lines_of_json(small_cells, tmp_path):
    _, cells = small_cells()
    StudyExporter(tmp_path).update(Schedule(cells).states(finish(Schedule(cells), {}, random.Random(0))))
    lines = [json.loads(line) for line in Path(tmp_path / JOURNAL_FILE).read_text().splitlines()]
    assert len(lines) == 2 * (1 + 1 + 4) and sorted(tmp_path.glob(f"{JOURNAL_FILE}*")) == [tmp_path / JOURNAL_FILE]
