"""A Ray of one's own: it is there within the context, and nothing of it is left afterwards, however its sweep ended."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmft.errors import UserError

STARTER = """
import sys, time
from sweeps.ray_backend.session import ray_session
print("coming up", flush=True)
with ray_session(None):
    print("up", flush=True)
    time.sleep(600)
"""


def processes_of(variable: str, value: str) -> list[str]:
    """Command lines of the processes whose environment holds a variable, as those inherit that a process has started."""
    lines = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


def assert_nothing_is_left(variable: str, value: str, wait_s: float = 90) -> None:
    """Ray's own watchdogs end what a killed driver has left: most at once, its agents within a minute."""
    deadline = time.monotonic() + wait_s
    while left := processes_of(variable, value):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.parametrize("when", ["coming up", "up"])
@pytest.mark.parametrize("by", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGINT])
def test_it_goes_with_the_process_that_started_it(tmp_path, when, by):
    environment = os.environ | {"MARK": str(tmp_path)}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    for line in starter.stdout:
        if line.strip() == when:
            break
    if when == "coming up":
        time.sleep(3.0)
    starter.send_signal(by)
    starter.wait(60)
    assert_nothing_is_left("MARK", str(tmp_path))


@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", pytest.param("gcs_server", marks=pytest.mark.long)])
def test_a_sweep_whose_ray_loses_a_process_says_so_and_ends(tmp_path, name):
    code = """
import sys, time
from sweeps.ray_backend.session import muted, ray_session, watched_head
with muted(False), ray_session(None), watched_head(lambda why: print(why, file=sys.stderr, flush=True)):
    print("up", file=sys.stderr, flush=True)
    time.sleep(120)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = iter(driver.stderr.readline, "")
    assert "up\n" in lines
    (victim,) = [process for process in psutil.Process(driver.pid).children() if process.name() == name]
    victim.kill()
    assert any(line.startswith(f"Ray: its {name} ended. What has finished is stored") for line in lines)
    assert driver.wait(30) == 1


@pytest.mark.ray
def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    import ray

    from sweeps.ray_backend.session import ray_session

    def fail(**settings):
        raise ConnectionError("no room in\n/dev/shm")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=r"Ray did not start on this machine \(no room in /dev/shm\)"), ray_session(None):
        pass


def test_a_finished_plan_starts_none(tmp_path, plan_file, tiny_model, monkeypatch, capsys):
    import ray

    from sweeps.cli.app import _run

    def start(**settings):
        raise AssertionError("Ray was started")

    changes = [("n_shots: [2, 4]", "n_shots: [2]"), ("n_trials: 4", "n_trials: 1"), ("seeds: [0, 1, 2]", "seeds: [0]")]
    arguments = ["sweep", str(plan_file(*changes, model=tiny_model)), "--out", str(tmp_path / "results")]
    assert _run([*arguments, "--serial"]) == 0
    monkeypatch.setattr(ray, "init", start)
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
with session.ray_session(None, n_cpus=2):
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
with session.ray_session(None):
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
