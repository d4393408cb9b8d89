"""Experiment trackers: what they are told, read back from their own files; and that they can neither fail nor hold up a sweep."""

import io
import struct
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.records import full_record

from llmft.errors import Cause, UserError
from llmft.trial.result import TrialResult
from sweeps.execution import trackers
from sweeps.execution.trackers import TRACKERS, Tracker, check_trackers, params_of, result_of
from sweeps.run import run_sweep

HOOKS = ("setup", "on_trial_start", "on_trial_result", "on_trial_complete", "on_experiment_end")


def run_full(spec, runtime):
    return TrialResult(full_record(spec))


@pytest.fixture
def sweep(tmp_path, small_cells):
    """Runs the small plan in this process with trackers; gives the outcome and what was said."""

    def run(*names, changes=(), run_trial=run_full, **options):
        plan, cells = small_cells(*changes)
        page = io.StringIO()
        outcome = run_sweep(
            plan, cells, tmp_path / "results", serial=True, trackers=names, console=Console(file=page, width=500),
            run_trial=run_trial, **options,
        )  # fmt: skip
        return outcome, page.getvalue()

    return run


@pytest.fixture
def specs(small_cells):
    """One spec each of the search, of a trained report trial and of zero-shot, with the entry's name."""
    zero_shot, _, lora, _ = small_cells()[1]
    point = {"learning_rate": 2e-3, "r": 4}
    return {
        "search": (lora.entry, lora.search_spec(point, 100)),
        "report": (lora.entry, lora.report_spec(point, 1)),
        "zero_shot": (zero_shot.entry, zero_shot.report_spec({}, 0)),
    }


def logger(monkeypatch, callback):
    """Puts a callback in the place of TensorBoard's."""
    from sweeps.execution import tracker_callbacks

    monkeypatch.setitem(tracker_callbacks.CALLBACKS, "tensorboard", lambda folder, sweep: callback)
    monkeypatch.setitem(TRACKERS, "tensorboard", "json")  # always installed


class Recorder:
    """A logger callback that remembers what it is told, and fails where it should."""

    def __init__(self, fails_at=(), error=RuntimeError("server says no\nat length")):
        self.calls, self.fails_at, self.error = [], fails_at, error

    def __getattr__(self, hook):
        if hook.startswith("__"):
            raise AttributeError(hook)

        def call(**about):
            self.calls.append((hook, str(about.get("trial", "")), about.get("result")))
            if hook in self.fails_at:
                raise self.error

        return call

    def names(self, hook):
        return [name for called, name, _ in self.calls if called == hook]


def test_a_record_becomes_numbers_and_a_curve(specs):
    result = result_of(full_record(specs["report"][1]))
    assert result["last/toy_accuracy"] == result["best_dev/toy_accuracy"] == 0.75 and result["best_dev/toy_hans_accuracy"] == 0.5
    assert result["best_dev/dev_score"] == pytest.approx(0.9 - 0.1 * 0.30103 + 0.001, abs=1e-4)
    assert (result["findings/note"], result["findings/warning"], result["failed"], result["cost/wall_s"]) == (0, 1, 0, 0.1)
    assert [point["training_iteration"] for point in result["curve"]] == [10, 20, 30]
    assert result["curve"][1] == {
        "training_iteration": 20, "curve/train_loss": 0.05, "curve/learning_rate": 1e-3, "curve/dev_score": 0.7,
    }  # fmt: skip
    failed = result_of(full_record(specs["report"][1], Cause.DIVERGED))
    assert failed["failed"] == 1 and failed["curve"] == [] and not any("accuracy" in name for name in failed)
    assert not any("accuracy" in name and "dev" not in name for name in result_of(full_record(specs["search"][1])))


def test_parameters_are_few_and_readable(specs):
    params = params_of(*specs["report"])
    assert params["learning_rate"] == 2e-3 and params["r"] == 4 and params["epochs"] == 2 and params["stage"] == "report"
    assert params_of(*specs["search"])["stage"] == "search"
    assert all(isinstance(value, str | int | float | bool) for value in params.values()) and len(params) < 24
    assert "learning_rate" not in params_of(*specs["zero_shot"])


def test_one_run_a_trial_in_the_order_that_tune_keeps(sweep, monkeypatch, tmp_path):
    callback = Recorder()
    logger(monkeypatch, callback)
    outcome, said = sweep("tensorboard")
    assert outcome.n_finished == 26 and "off from here" not in said
    assert callback.calls[0][0] == "setup" and callback.calls[-1][0] == "on_experiment_end"
    by_run = {}
    for hook, name, _ in callback.calls[1:-1]:
        by_run.setdefault(name, []).append(hook)
    assert len(by_run) == 26
    for name, hooks in by_run.items():
        n_points = 3 if name.startswith("lora") else 0
        assert hooks == ["on_trial_start", *["on_trial_result"] * (n_points + 1), "on_trial_complete"]
    digests = {path.name for path in (tmp_path / "results" / "trials").iterdir()}
    assert {name.split()[-1] for name in by_run} == digests
    assert sum(name.startswith("lora toy 4 shots seed 100 ") for name in by_run) == 4


def test_a_resumed_sweep_logs_nothing_twice_and_what_was_missed_later(sweep, monkeypatch):
    callbacks = [Recorder() for _ in range(4)]
    sweep()  # without a tracker
    logger(monkeypatch, callbacks[0])
    assert sweep("tensorboard")[0].n_new == 0 and len(callbacks[0].names("on_trial_complete")) == 26
    logger(monkeypatch, callbacks[1])
    sweep("tensorboard")
    assert callbacks[1].names("on_trial_start") == []
    logger(monkeypatch, callbacks[2])
    outcome, _ = sweep("tensorboard", changes=[("seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]")])
    assert outcome.n_new == 3 and all(" seed 3 " in name for name in callbacks[2].names("on_trial_complete"))
    assert len(callbacks[2].names("on_trial_complete")) == 3


def test_a_trial_that_failed_is_logged_as_failed_and_again_when_it_has_finished(sweep, monkeypatch):
    def failing(spec, runtime):
        cause = Cause.CRASHED if spec.method == "zero_shot" else None
        return TrialResult(full_record(spec, cause))

    callbacks = [Recorder(), Recorder()]
    logger(monkeypatch, callbacks[0])
    sweep("tensorboard", run_trial=failing)
    (failed,) = callbacks[0].names("on_trial_error")
    assert failed.startswith("zero_shot toy 0 shots") and len(callbacks[0].names("on_trial_complete")) == 25
    logger(monkeypatch, callbacks[1])
    sweep("tensorboard")
    assert callbacks[1].names("on_trial_complete") == [failed]


@pytest.mark.parametrize("error", [RuntimeError("server says no\nat length"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_tracker_that_fails_is_said_once_and_harms_nothing(sweep, monkeypatch, hook, error):
    callbacks = [Recorder(fails_at=[hook], error=error), Recorder()]
    logger(monkeypatch, callbacks[0])
    outcome, said = sweep("tensorboard")
    assert (outcome.n_finished, outcome.n_failed) == (26, 0)
    assert said.count("--track tensorboard: off from here on") == 1 and "at length" not in said
    assert callbacks[0].calls[-1][0] == hook  # nothing is called any more
    logger(monkeypatch, callbacks[1])
    _, said = sweep("tensorboard")  # what is missing comes later
    n_logged = len(callbacks[0].names("on_trial_complete")) - (hook == "on_trial_complete")
    assert len(callbacks[1].names("on_trial_complete")) == 26 - n_logged and "off from here" not in said


def test_a_tracker_that_hangs_delays_nothing_but_the_end(sweep, monkeypatch):
    class Hanging(Recorder):
        def on_trial_start(self, **about):
            released.wait()

    released = threading.Event()
    logger(monkeypatch, Hanging())
    monkeypatch.setattr(trackers, "WAIT_S", 0.5)
    started = time.monotonic()
    outcome, said = sweep("tensorboard")
    assert outcome.n_finished == 26 and time.monotonic() - started < 10 and "not everything is logged yet" in said
    released.set()


def test_a_stopped_sweep_keeps_what_had_finished_in_its_tracker(sweep, monkeypatch):
    ended = []

    def stop_after_five(spec, runtime):
        if len(ended) == 5:
            raise KeyboardInterrupt
        ended.append(spec.digest)
        return run_full(spec, runtime)

    callback = Recorder()
    logger(monkeypatch, callback)
    with pytest.raises(KeyboardInterrupt):
        sweep("tensorboard", run_trial=stop_after_five)
    assert [name.split()[-1] for name in callback.names("on_trial_complete")] == ended


def test_mistakes_are_found_before_anything_runs(monkeypatch, sweep, tmp_path):
    with pytest.raises(UserError, match="--track: unknown tracker 'mlfow'. Did you mean 'mlflow'"):
        check_trackers(["mlfow"])
    monkeypatch.setitem(TRACKERS, "mlflow", "no_such_package")
    with pytest.raises(UserError, match=r"--track mlflow: No module named 'no_such_package'.* pip install 'llmft\[mlflow\]'"):
        sweep("mlflow")
    assert not list((tmp_path / "results" / "trials").iterdir())


def tensorboard_scalars(path):
    """tag -> {step: value} of an event file (TFRecord: length, checksum, content, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    content, at, scalars = path.read_bytes(), 0, {}
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_tensorboard_has_the_curve_and_the_numbers(sweep, tmp_path):
    pytest.importorskip("tensorboardX")
    _, said = sweep("tensorboard")
    assert "off from here" not in said
    folders = list((tmp_path / "results" / "tracking" / "tensorboard").iterdir())
    assert Counter(folder.name.split()[0] for folder in folders) == {"lora": 22, "in_context": 3, "zero_shot": 1}
    (folder,) = [folder for folder in folders if folder.name.startswith("lora toy 2 shots seed 1 ")]
    (events,) = folder.iterdir()
    scalars = tensorboard_scalars(events)
    assert scalars["ray/tune/curve/dev_score"] == pytest.approx({10: 0.6, 20: 0.7, 30: 0.8})
    assert scalars["ray/tune/best_dev/toy_hans_accuracy"] == {30: 0.5} and scalars["ray/tune/findings/warning"] == {30: 1}


def test_mlflow_has_parameters_curve_and_status(sweep, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def failing(spec, runtime):
        cause = Cause.DIVERGED if spec.method == "zero_shot" else None
        return TrialResult(full_record(spec, cause))

    _, said = sweep("mlflow", run_trial=failing)
    assert "off from here" not in said
    client = MlflowClient(f"sqlite:///{tmp_path}/results/tracking/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert Counter(run.info.status for run in runs) == {"FINISHED": 25, "FAILED": 1}
    (run,) = [run for run in runs if run.info.run_name.startswith("lora toy 4 shots seed 2 ")]
    assert run.data.params["n_shots"] == "4" and run.data.params["entry"] == "lora" and run.data.params["stage"] == "report"
    assert run.data.metrics["last/toy_accuracy"] == 0.75 and run.data.metrics["cost/wall_s"] == 0.1
    curve = client.get_metric_history(run.info.run_id, "curve/dev_score")
    assert {point.step: point.value for point in curve} == pytest.approx({10: 0.6, 20: 0.7, 30: 0.8})
    assert not (tmp_path / "mlruns").exists() and not (tmp_path / "mlflow.db").exists()


def test_an_mlflow_server_that_is_not_there_is_one_line(sweep, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome, said = sweep("mlflow")
    assert outcome.n_finished == 26 and said.count("--track mlflow: off from here on") == 1


def wandb_records(path):
    """Every record of a .wandb file: blocks of 32 KiB, in which a record, or a part of it, follows checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768


def test_wandb_is_offline_and_has_the_curve(sweep, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    _, said = sweep("wandb")
    assert "off from here" not in said
    folder = tmp_path / "results" / "tracking" / "wandb"
    runs = {}
    for path in folder.glob("offline-run-*/*.wandb"):
        records = list(wandb_records(path))
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.project, run.run_id) == ("small", path.stem.removeprefix("run-"))
        runs[run.display_name] = run, [record.history for record in records if record.HasField("history")]
    assert len(runs) == 26
    ((run, history),) = [runs[name] for name in runs if name.startswith("lora toy 2 shots seed 1 ")]
    config = {item.key: item.value_json for item in run.config.update}
    assert run.run_group == "lora toy 2 shots" and config["n_shots"] == "2" and config["task"] == '"toy"'
    steps = [{**{item.key or "/".join(item.nested_key): item.value_json for item in step.item}, "step": step.step.num} for step in history]
    assert [(step["step"], step["curve/dev_score"]) for step in steps] == [(10, "0.6"), (20, "0.7"), (30, "0.8")]
    assert steps[-1]["best_dev/toy_accuracy"] == "0.75"


@pytest.mark.ray
def test_on_ray_a_lost_trial_is_logged_as_failed(tmp_path, small_cells, monkeypatch):
    from functools import partial

    from support.fakes import fake_trial

    from sweeps.search.retry_policy import FailurePolicy, Loss

    callback = Recorder()
    logger(monkeypatch, callback)
    plan, cells = small_cells(
        ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""), ("n_shots: [2, 4]", "n_shots: [2]"),
        ("r: {choices: [2, 4]}", "learning_rate: {choices: [1e-3, 1e-2]}"),
        ("{n_trials: 4, seeds: [100, 101]", "{n_trials: 2, seeds: [100]"),
    )  # fmt: skip
    outcome = run_sweep(
        plan, cells, tmp_path / "results", workers=2, trackers=["tensorboard"], console=Console(quiet=True),
        policy=FailurePolicy(budget={Loss.PROCESS: 0}), run_trial=partial(fake_trial, log=str(tmp_path / "log"), dies_at=5e-3),
    )  # fmt: skip
    assert (outcome.n_finished, outcome.n_failed) == (4, 1)
    assert len(callback.names("on_trial_complete")) == 4 and len(callback.names("on_trial_error")) == 1
    assert callback.calls[-1][0] == "on_experiment_end"


def test_a_tracker_waits_for_nobody(tmp_path):
    """Telling a tracker about a trial takes no time, however slow it is."""
    slow = SimpleNamespace(setup=lambda: time.sleep(0.5), on_experiment_end=lambda trials: None)
    tracker = Tracker("slow", tmp_path, lambda: slow, print)
    started = time.monotonic()
    tracker.finish()
    assert time.monotonic() - started < 0.2
    tracker.wait(5)
