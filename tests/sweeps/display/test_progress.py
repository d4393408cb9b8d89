"""The progress of a sweep: the live table on a real terminal, the lines elsewhere."""

import fcntl
import io
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.fakes import fake_record

from llmft.errors import Cause
from sweeps.display.live_table import cell_row
from sweeps.display.progress import Progress
from sweeps.search.schedule import Schedule

SNAPSHOT_AFTER = 9


@pytest.mark.parametrize("status", ["", "waiting for 4 GPUs"])
@pytest.mark.parametrize(("width", "height"), [(160, 50), (80, 24), (80, 12), (60, 8), (40, 5)])
def test_the_display_fits_and_no_cell_is_forgotten(underway, width, height, status):
    schedule, records = underway(SNAPSHOT_AFTER)
    progress = Progress(schedule, 2, Console(quiet=True))
    progress.update(records, 2)
    progress.status(status)
    rows = [cell_row(state, records) for state in schedule.states(records)]
    snapshot, page = replace(progress._snapshot, rows=rows * 9), io.StringIO()
    Console(file=page, width=width, height=height, force_terminal=True, color_system=None).print(progress.render(snapshot, width, height))
    lines = page.getvalue().rstrip("\n").split("\n")
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    assert f"{9 * SNAPSHOT_AFTER}/{9 * 26} trials" in page.getvalue() and status in page.getvalue()
    if height > 5:
        shown = sum(bool(re.search(r"\b(lora|in_context|zero_shot) ", line)) for line in lines)
        hidden = re.search(r"and (\d+) more cells: (.*)", page.getvalue())
        assert shown + (int(hidden[1]) if hidden else 0) == len(snapshot.rows)
        assert not hidden or sum(map(int, re.findall(r"\d+", hidden[2]))) == int(hidden[1])


@pytest.fixture
def plain(small_cells):
    """Progress on a page that is no terminal."""
    page = io.StringIO()
    return Progress(Schedule(small_cells()[1]), 2, Console(file=page, width=60)), page


def test_without_a_terminal_it_speaks_in_lines(plain, small_cells, monkeypatch):
    progress, page = plain
    cell = small_cells()[1][1]
    spec = cell.report_spec({}, 0)
    failed = fake_record(spec, Cause.CRASHED)
    with progress:
        progress.update({}, 0)
        progress.status("starting workers ...")
        progress.status("waiting for 2 GPUs")
        progress._printed -= 1000  # a line is due
        progress._update_at = 0
        progress.ended(failed)
        progress.update({spec.digest: failed}, 2)
        progress.status("")
        progress.status("starting workers ...")
    lines = page.getvalue().splitlines()
    assert "\x1b" not in page.getvalue()
    assert lines[:2] == ["starting workers ...", "waiting for 2 GPUs"]  # each once, and with every line while it stands
    assert lines[2] == f"failed: toy in_context 2 shots seed 0 ({spec.digest}) crashed: as planned"
    assert lines[3].startswith("1/26 trials, 0/4 cells, 1 failed, 2 running, ")
    assert lines[3].endswith(", time left not known yet, waiting for 2 GPUs")
    assert len(lines) == 5 and re.fullmatch("1/26 trials, .* time left not known yet", lines[4])


def test_a_mistake_at_the_start_is_not_followed_by_numbers(plain):
    progress, page = plain
    with pytest.raises(ValueError), progress:
        progress.update({}, 0)
        raise ValueError
    assert page.getvalue() == ""


def test_retries_are_counted_and_said(plain, small_cells):
    progress, page = plain
    trial = progress.schedule.ready({})[0]
    progress.retried(trial.spec, "its process died")
    progress.update({}, 1)
    assert "again: toy" in page.getvalue() and ": its process died" in page.getvalue()
    assert "1 retried" in progress._snapshot.line


def test_many_looks_are_cheap(underway):
    schedule, records = underway(12)
    progress = Progress(schedule, 2, Console(quiet=True))
    calls = []
    schedule.states, states = lambda known: calls.append(1) or states(known), schedule.states
    started = time.perf_counter()
    for _ in range(5000):
        progress.update(records, 2)
    assert time.perf_counter() - started < 1 and len(calls) <= 3
    progress.update(records, 0, last=True)
    assert progress._snapshot.n_running == 0


ON_A_TERMINAL = """
import sys, time
from functools import partial
from support.fakes import fake_data, fake_model, fake_record
from llmft.errors import Cause
from llmft.trial.run import TrialResult
from sweeps.planning import build_cells, load_plan
from sweeps.run import SweepOptions, run_sweep
from support.records import full_record

def trial(spec, runtime):
    time.sleep(0.12)
    return TrialResult(full_record(spec, Cause.DIVERGED if spec.method == "in_context" else None))

plan, where = load_plan(sys.argv[1])
run_sweep(plan, build_cells(plan, where, fake_model, fake_data), sys.argv[2], SweepOptions(serial=True), run_trial=trial)
"""


def watch(arguments, width, height):
    """Run a process on a terminal of this size; returns what the terminal showed, in order, and the exit code.

    The last is what stands there when the process has ended, with the lines that scrolled out of it.
    """
    import pyte

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), "LINES": str(height)}
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    terminal = pyte.HistoryScreen(width, height, history=1000)
    stream, screens = pyte.ByteStream(terminal), []
    while True:
        try:
            ready = select.select([ours], [], [], 60)[0]
            stream.feed(os.read(ours, 65536) if ready else b"")
        except OSError:  # the other end is closed
            break
        assert ready, "nothing is shown any more"
        if not select.select([ours], [], [], 0.05)[0]:  # not in the middle of a refresh
            screens.append([line.rstrip() for line in terminal.display])
    scrolled = ["".join(line[column].data for column in range(width)) for line in terminal.history.top]
    screens.append([line.rstrip() for line in [*scrolled, *terminal.display]])
    os.close(ours)
    return screens, process.wait(10)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 12)])
def test_on_a_terminal_there_is_one_table_and_what_was_said_stays(plan_file, tmp_path, width, height):
    pytest.importorskip("pyte", reason="a terminal emulator reads the display")
    screens, code = watch([sys.executable, "-c", ON_A_TERMINAL, plan_file(), tmp_path / "results"], width, height)
    assert code == 0
    at_work = [lines for lines in screens if any(" running" in line for line in lines)]
    assert len(at_work) > 2
    for lines in at_work:
        (bar,) = [index for index, line in enumerate(lines) if "━" in line]  # messages stand above
        assert re.match(r"\d+/26 trials, \d/4 cells, [01] running(, \d+\.\d trials/min)?$", lines[bar + 1])
        assert sum(" running" in line for line in lines) == 1
    rows = [[line for line in lines if re.match(r"[•✓ ]\s+(lora|in_context|zero_shot)\s+\d\s", line)] for lines in at_work]
    assert any(line[0] == "•" for lines in rows for line in lines) and any(line[0] == "✓" for line in rows[-1])
    assert all(len(lines) == 4 and "•" not in "".join(line[0] for line in lines[1:]) for lines in rows)  # what runs is first
    assert any("about" in line and "━" in line for line in at_work[-1]) and any("3 failed, " in line for line in at_work[-1])
    assert any(line.startswith("failed: toy in_context") for line in at_work[-1])
    last = "".join(screens[-1])  # without the table; long lines are broken by the terminal
    assert "━" not in last and last.count("diverged: as planned") == 3
    assert "26/26 trials, 4/4 cells, 3 failed, 23 flagged, took" in last


def test_what_trials_wait_for_is_said(small_cells, monkeypatch):
    """Four trials of one GPU each are handed out, two have their worker, and the cluster has two GPUs, later four."""
    from sweeps.ray_backend import searcher
    from sweeps.resources.slots import ResourceRequest

    page, cells, cluster = io.StringIO(), small_cells()[1], {"CPU": 16.0, "GPU": 2.0}
    progress = Progress(Schedule(cells), 2, Console(file=page))
    trials = dict(zip("abcd", progress.schedule.ready({}), strict=False))
    stub = SimpleNamespace(
        error=None, trials=trials, request_of=lambda trial: ResourceRequest(gpus=1.0),
        state=SimpleNamespace(progress=progress, records={}, running=trials, done=False),
    )  # fmt: skip
    callback = searcher.SweepCallback(stub)
    clock = [1000.0]
    monkeypatch.setattr(searcher.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(searcher.ray, "cluster_resources", lambda: cluster)

    def look(after_s):
        clock[0] += after_s
        callback.on_step_begin(0, [])
        return progress._status

    assert look(0) == "starting workers ..."
    for trial_id in "ab":
        callback.on_trial_start(0, [], SimpleNamespace(trial_id=trial_id))
    assert look(2) == ""
    assert look(4) == "waiting for 2 more GPUs: the cluster is full, or still growing"
    cluster["GPU"] = 4.0
    assert look(2) == "starting workers ..."
    for trial_id in "cd":
        callback.on_trial_start(0, [], SimpleNamespace(trial_id=trial_id))
    assert look(2) == ""
    stub.on_loss = lambda *_, **__: None
    callback.on_trial_recover(0, [], SimpleNamespace(trial_id="a", pickled_error_file="nowhere"))
    assert look(2) == "" and look(6) == "starting workers ..."
    stub.state.done = True
    with pytest.raises(searcher.Done):  # before Tune writes down what it knows
        look(1)


ON_RAY = """
import sys
from functools import partial
from support.fakes import fake_data, fake_model, fake_trial
from sweeps.planning import build_cells, load_plan
from sweeps.run import SweepOptions, run_sweep

plan, where = load_plan(sys.argv[1])
trial = partial(fake_trial, log=sys.argv[3], dies_at=5e-3, dies_once=True)
run_sweep(plan, build_cells(plan, where, fake_model, fake_data), sys.argv[2], SweepOptions(workers=2), run_trial=trial)
"""


@pytest.mark.long
@pytest.mark.ray
def test_ray_itself_is_not_heard(plan_file, tmp_path):
    plan = plan_file(
        ("  in_context: {n_shots: [2]}\n", ""),
        ("n_shots: [2, 4]", "n_shots: [2]"),
        ("r: {choices: [2, 4]}", "learning_rate: {choices: [1e-3, 1e-2]}"),
        ("{n_trials: 4, seeds: [100, 101]", "{n_trials: 2, seeds: [100]"),
    )
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, plan, tmp_path / "results", tmp_path / "log"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    running = re.compile(r"\d/6 trials, .* running, ")  # said every twenty seconds, where a machine takes so long
    lines = [line for line in done.stderr.splitlines() if not running.match(line)]
    assert done.returncode == 0 and done.stdout == ""
    assert lines[:2] == ["starting Ray ...", "starting workers ..."]
    assert re.fullmatch(r"again: toy lora 2 shots seed 100 \(\w{20}\): its process died", lines[2])
    assert re.fullmatch(r"6/6 trials, 2/2 cells, 1 retried, took .*", lines[3]) and len(lines) == 4
