"""A Ray of our own: it is there when it is asked for, and nothing of it is left afterwards, however its sweep ended."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmft.errors import UserError
from sweeps.ray_backend import local_head as own_ray
from sweeps.ray_backend.local_head import OwnRay

STARTER = """
import sys, time
from sweeps.ray_backend.local_head import OwnRay
with OwnRay() as ray_here:
    ray_here.start(1)
    if sys.argv[1] == "up":
        ray_here.address()
    print(ray_here.scratch, flush=True)
    time.sleep(600)
"""


def processes_of(folder, variable: str = "RAY_TMPDIR") -> list[str]:
    """Command lines of the processes that belong to the Ray below a folder: a variable of theirs names it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def assert_nothing_is_left(folder, variable: str = "RAY_TMPDIR") -> None:
    deadline = time.monotonic() + 20
    while left := processes_of(folder, variable):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.ray
def test_it_grows_where_more_is_asked_for_and_is_gone_at_the_end():
    with OwnRay() as ray_here:
        ray_here.start(1)
        first = ray_here._head.pid
        ray_here.start(1)
        assert ray_here._head.pid == first
        address, folder = ray_here.address(), ray_here.scratch
        assert ray_here.address() == address and processes_of(folder)
        ray_here.start(1, groups=True)
        assert ray_here._head.pid != first
        assert not folder.exists()
        assert_nothing_is_left(folder)
        folder = ray_here.scratch
        ray_here.end()
        ray_here.start(1)  # what ends is of no use any more
        assert not folder.exists() and ray_here.address()
        folder = ray_here.scratch
    assert not folder.exists()
    assert_nothing_is_left(folder)


@pytest.mark.ray
@pytest.mark.parametrize("when", ["coming up", "up"])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_with_the_process_that_started_it(when, by):
    starter = subprocess.Popen([sys.executable, "-c", STARTER, when], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    folder = starter.stdout.readline().strip()
    if when == "coming up":
        time.sleep(1.0)
    assert processes_of(folder)
    starter.send_signal(by)
    starter.wait()
    assert_nothing_is_left(folder)
    assert by is signal.SIGKILL or not os.path.exists(folder)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raylet", "its raylet ended"),
        pytest.param("gcs_server", "its gcs_server ended", marks=pytest.mark.long),
        pytest.param("sweeps.ray_backend.local_head", "its process was killed (signal 9)", marks=pytest.mark.long),
    ],
)
def test_it_says_why_it_is_there_no_more(name, why):
    with OwnRay() as ray_here:
        assert ray_here.why_ended() == ""
        ray_here.start()
        ray_here.address()
        assert ray_here.why_ended() == ""
        mine = [psutil.Process(ray_here._head.pid), *psutil.Process(ray_here._head.pid).children()]
        (victim,) = [process for process in mine if any(part.endswith(name) for part in process.cmdline()[:4])]
        victim.kill()
        deadline = time.monotonic() + 20
        while not ray_here.why_ended():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert ray_here.why_ended() == why
        folder = ray_here.scratch
    assert_nothing_is_left(folder)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo Traceback >&2; echo 'OSError: no room in /dev/shm' >&2", "OSError: no room in /dev/shm"),
        ("exit 1", "no word why; -v shows what it prints"),
        ("kill -9 $$", "its process was killed (signal 9)"),
    ],
)
def test_one_that_does_not_start_says_why_in_a_line(tmp_path, monkeypatch, script, line):
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setattr(own_ray.sys, "executable", str(broken))
    with OwnRay() as ray_here:
        ray_here.start()
        with pytest.raises(UserError) as caught:
            ray_here.address()
        folder = ray_here.scratch
    assert str(caught.value) == f"Ray did not start on this machine: {line}"
    assert not folder.exists()


@pytest.mark.ray
def test_a_mistake_that_shows_while_ray_comes_up_is_one_line_and_leaves_nothing(tmp_path, plan_file):
    arguments = ["sweep", str(plan_file()), "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.cli", *arguments], capture_output=True, text=True, env=os.environ | {"MARK": str(tmp_path)}
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "there is no folder" in done.stderr
    assert not (tmp_path / "results").exists()
    assert_nothing_is_left(tmp_path, "MARK")


def test_a_sweep_that_may_have_results_starts_none_before_it_has_looked(tmp_path, plan_file, tiny_model, monkeypatch, capsys):
    from sweeps.cli.app import _run

    def start(*_, **__):
        raise AssertionError("Ray was started")

    changes = [("n_shots: [2, 4]", "n_shots: [2]"), ("n_trials: 4", "n_trials: 1"), ("seeds: [0, 1, 2]", "seeds: [0]")]
    arguments = ["sweep", str(plan_file(*changes, model=tiny_model)), "--out", str(tmp_path / "results")]
    assert _run([*arguments, "--serial"]) == 0
    monkeypatch.setattr(OwnRay, "start", start)
    assert _run(arguments) == 0
    assert " 0 ran now" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.long
def test_it_leaves_the_environment_and_another_ray_alone(tmp_path):
    code = """
import os, ray
how = {"num_cpus": 1, "include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
def one_task():
    return ray.get(ray.remote(lambda: 1).remote())
ray.init(address="local", **how); assert one_task() == 1; ray.shutdown()
before = dict(os.environ)
from sweeps.ray_backend import session
with session.local_ray(2):
    assert one_task() == 1 and ray.cluster_resources()["CPU"] >= 2
after = {name: value for name, value in os.environ.items() if name not in before}
assert after.keys() <= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_GLOBAL_CHECKPOINT_S", "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_MAX_PENDING_TRIALS_PG", "RAY_AIR_NEW_OUTPUT", "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED"}, after
assert not [name for name in before if os.environ.get(name) != before[name]]
ray.init(address="local", **how); assert one_task() == 1; ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.long
def test_modules_of_the_working_directory_are_not_taken_for_ours(tmp_path):
    for name in ("sweeps", "llmft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')")
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text("""
import json, ray, sweeps
from sweeps.ray_backend import session
def files():
    import json, sweeps
    return json.__file__, sweeps.__file__
with session.local_ray(1):
    assert ray.get(ray.remote(files).remote()) == (json.__file__, sweeps.__file__)
""")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere", "give host:port"), ("127.0.0.1:1", "nothing answers at 127.0.0.1:1"), ("auto", "nothing answers at .*:1 ")],
)
def test_an_address_where_nothing_answers_is_a_mistake(monkeypatch, address, said):
    from sweeps.ray_backend.session import ray_session

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # which is what auto stands for then
    with pytest.raises(UserError, match=said), ray_session(address, verbose=False):
        pass
