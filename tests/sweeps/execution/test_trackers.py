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
from sweeps.execution.tracker_writers import WRITERS
from sweeps.execution.trackers import TRACKERS, Tracker, check_trackers, params_of, rows_of
from sweeps.run import SweepOptions, run_sweep

METHODS = ("build", "log", "close")


def run_full(spec, runtime):
    return TrialResult(full_record(spec))


@pytest.fixture
def sweep(tmp_path, small_cells):
    """Runs the small plan in this process with trackers; gives the outcome and what was said."""

    def run(*names, changes=(), run_trial=run_full, **options):
        plan, cells = small_cells(*changes)
        page = io.StringIO()
        how, console = SweepOptions(serial=True, trackers=names), Console(file=page, width=500)
        outcome = run_sweep(plan, cells, tmp_path / "results", how, console=console, run_trial=run_trial, **options)
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


def logger(monkeypatch, writer):
    """Puts a writer in the place of TensorBoard's."""
    monkeypatch.setitem(WRITERS, "tensorboard", lambda folder, sweep: writer.build())
    monkeypatch.setitem(TRACKERS, "tensorboard", "json")  # always installed


class Recorder:
    """A writer that remembers what it is told, and fails where it should."""

    def __init__(self, fails_at=(), error=RuntimeError("server says no\nat length")):
        self.calls, self.trials, self.fails_at, self.error = [], [], fails_at, error

    def build(self):
        self._called("build")
        return self

    def log(self, trial):
        self.trials.append(trial)
        self._called("log")

    def close(self):
        self._called("close")

    def _called(self, method):
        self.calls.append(method)
        if method in self.fails_at:
            raise self.error

    def names(self, failed=None):
        return [trial.name for trial in self.trials if failed in (None, trial.failed)]


def test_a_record_becomes_a_curve_and_results(specs):
    *curve, (step, results) = rows_of(full_record(specs["report"][1]))
    assert results["last/toy_accuracy"] == results["best_dev/toy_accuracy"] == 0.75 and results["best_dev/toy_hans_accuracy"] == 0.5
    assert results["best_dev/dev_score"] == pytest.approx(0.9 - 0.1 * 0.30103 + 0.001, abs=1e-4)
    assert (results["findings/note"], results["findings/warning"], results["failed"], results["cost/wall_s"]) == (0, 1, 0, 0.1)
    assert [number for number, _ in curve] == [10, 20, 30] and step == 30
    assert curve[1] == (20, {"curve/train_loss": 0.05, "curve/learning_rate": 1e-3, "curve/dev_score": 0.7})
    ((step, failed),) = rows_of(full_record(specs["report"][1], Cause.DIVERGED))
    assert step == 1 and failed["failed"] == 1 and not any("accuracy" in name for name in failed)
    assert not any("accuracy" in name and "dev" not in name for _, row in rows_of(full_record(specs["search"][1])) for name in row)


def test_parameters_are_few_and_readable(specs):
    params = params_of(*specs["report"])
    assert params["learning_rate"] == 2e-3 and params["r"] == 4 and params["epochs"] == 2 and params["stage"] == "report"
    assert params_of(*specs["search"])["stage"] == "search"
    assert all(isinstance(value, str | int | float | bool) for value in params.values()) and len(params) < 24
    assert "learning_rate" not in params_of(*specs["zero_shot"])


def test_one_run_a_trial(sweep, monkeypatch, tmp_path):
    writer = Recorder()
    logger(monkeypatch, writer)
    outcome, said = sweep("tensorboard")
    assert outcome.n_finished == 26 and "off from here" not in said
    assert writer.calls == ["build", *["log"] * 26, "close"]
    for trial in writer.trials:
        assert len(trial.rows) == (4 if trial.name.startswith("lora") else 1)
        assert [step for step, _ in trial.rows] == sorted(step for step, _ in trial.rows)
    digests = {path.name for path in (tmp_path / "results" / "trials").iterdir()}
    assert {trial.digest for trial in writer.trials} == {name.split()[-1] for name in writer.names()} == digests
    assert sum(name.startswith("lora toy 4 shots seed 100 ") for name in writer.names()) == 4


def test_a_resumed_sweep_logs_nothing_twice_and_what_was_missed_later(sweep, monkeypatch):
    writers = [Recorder() for _ in range(4)]
    sweep()  # without a tracker
    logger(monkeypatch, writers[0])
    assert sweep("tensorboard")[0].n_new == 0 and len(writers[0].names()) == 26
    logger(monkeypatch, writers[1])
    sweep("tensorboard")
    assert writers[1].names() == []
    logger(monkeypatch, writers[2])
    outcome, _ = sweep("tensorboard", changes=[("seeds: [0, 1, 2]", "seeds: [0, 1, 2, 3]")])
    assert outcome.n_new == 3 and all(" seed 3 " in name for name in writers[2].names())
    assert len(writers[2].names()) == 3


def test_a_trial_that_failed_is_logged_as_failed_and_again_when_it_has_finished(sweep, monkeypatch):
    def failing(spec, runtime):
        cause = Cause.CRASHED if spec.method == "zero_shot" else None
        return TrialResult(full_record(spec, cause))

    writers = [Recorder(), Recorder()]
    logger(monkeypatch, writers[0])
    sweep("tensorboard", run_trial=failing)
    (failed,) = writers[0].names(failed=True)
    assert failed.startswith("zero_shot toy 0 shots") and len(writers[0].names(failed=False)) == 25
    logger(monkeypatch, writers[1])
    sweep("tensorboard")
    assert writers[1].names(failed=False) == [failed]


@pytest.mark.parametrize("error", [RuntimeError("server says no\nat length"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tracker_that_fails_is_said_once_and_harms_nothing(sweep, monkeypatch, method, error):
    writers = [Recorder(fails_at=[method], error=error), Recorder()]
    logger(monkeypatch, writers[0])
    outcome, said = sweep("tensorboard")
    assert (outcome.n_finished, outcome.n_failed) == (26, 0)
    assert said.count("--track tensorboard: off from here on") == 1 and "at length" not in said
    assert writers[0].calls[-1] == method  # nothing is called any more
    logger(monkeypatch, writers[1])
    _, said = sweep("tensorboard")  # what is missing comes later
    n_logged = len(writers[0].names()) - (method == "log")
    assert len(writers[1].names()) == 26 - n_logged and "off from here" not in said


def test_a_tracker_that_hangs_delays_nothing_but_the_end(sweep, monkeypatch):
    class Hanging(Recorder):
        def log(self, trial):
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

    writer = Recorder()
    logger(monkeypatch, writer)
    with pytest.raises(KeyboardInterrupt):
        sweep("tensorboard", run_trial=stop_after_five)
    assert [name.split()[-1] for name in writer.names()] == ended


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
    assert scalars["curve/dev_score"] == pytest.approx({10: 0.6, 20: 0.7, 30: 0.8})
    assert scalars["best_dev/toy_hans_accuracy"] == {30: 0.5} and scalars["findings/warning"] == {30: 1}


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

    writer = Recorder()
    logger(monkeypatch, writer)
    plan, cells = small_cells(
        ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""), ("n_shots: [2, 4]", "n_shots: [2]"),
        ("r: {choices: [2, 4]}", "learning_rate: {choices: [1e-3, 1e-2]}"),
        ("{n_trials: 4, seeds: [100, 101]", "{n_trials: 2, seeds: [100]"),
    )  # fmt: skip
    options, policy = SweepOptions(workers=2, trackers=("tensorboard",)), FailurePolicy(budget={Loss.PROCESS: 0})
    trial = partial(fake_trial, log=str(tmp_path / "log"), dies_at=5e-3)
    outcome = run_sweep(plan, cells, tmp_path / "results", options, console=Console(quiet=True), policy=policy, run_trial=trial)
    assert (outcome.n_finished, outcome.n_failed) == (4, 1)
    assert len(writer.names(failed=False)) == 4 and len(writer.names(failed=True)) == 1
    assert writer.calls[-1] == "close"


def test_a_tracker_waits_for_nobody(tmp_path):
    """Telling a tracker about a trial takes no time, however slow it is."""
    slow = SimpleNamespace(close=lambda: None)
    tracker = Tracker("slow", tmp_path, lambda: time.sleep(0.5) or slow, print)
    started = time.monotonic()
    tracker.finish()
    assert time.monotonic() - started < 0.2
    tracker.wait(5)
