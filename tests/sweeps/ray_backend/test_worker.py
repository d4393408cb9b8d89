"""One trial by a group of Ray Train's workers, and the same loop in the calling process."""

from __future__ import annotations

import io
import os
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import ray
import ray.train

from llmft.config.spec import TrainSpec, TrialSpec
from llmft.errors import Cause, OutOfMemory, TrialFailure
from llmft.methods._registry import complete_settings
from llmft.models.info import resolve_model
from llmft.runtime import Runtime
from llmft.trial.run import run_trial
from sweeps.ray_backend.worker_group import _failure, run_group, train_loop
from sweeps.store.store import Store

pytestmark = pytest.mark.ray
PAIR = SimpleNamespace(n_workers=2, cpus=1, gpus=0)


@pytest.fixture(scope="module")
def local_ray():
    from sweeps.ray_backend import session
    from sweeps.ray_backend.scratch import scratch_folder

    with scratch_folder(None) as scratch, session.ray_session(None, n_cpus=2):
        yield scratch


@pytest.fixture
def job_of(tmp_path, tiny_model, local_ray):
    def make(method: str, run_trial=None, strategy: str = "ddp", **more):
        spec = TrialSpec(
            model=resolve_model(tiny_model),
            task="toy",
            method=method,
            settings=complete_settings(method, {}),
            n_shots=16,
            n_dev=7,
            n_test=14,
            train=TrainSpec(learning_rate=1e-3, epochs=3, batch_size=6, dropout=0.0, epsilon=1e-4),
        )
        return spec, {
            "root": str(tmp_path / "results"),
            "scratch": str(local_ray),
            "digest": spec.digest,
            "spec": spec.model_dump_json(),
            "n_threads": 1,
            "n_trials_before": 0,
            "run_trial": run_trial,
            "strategy": strategy,
            **more,
        }

    return make


def log_probabilities(content: bytes) -> np.ndarray:
    return np.array(parquet.read_table(io.BytesIO(content))["label_log_probabilities"].to_pylist())


@pytest.mark.parametrize(
    ("strategy", "method"),
    [pytest.param("ddp", "pattern", marks=pytest.mark.long), ("fsdp", "lora")],  # both: test_distributed
)
def test_a_group_gives_the_record_of_one_process(job_of, strategy, method):
    spec, job = job_of(method, strategy=strategy, keep_weights=True, micro_batch_tokens=100)
    expected = run_trial(spec, Runtime(device="cpu"))
    run_group(job, PAIR)
    store = Store(job["root"])
    record, folder = store.get(spec.digest), store.folder(spec.digest)
    assert record.finished, record.message
    np.testing.assert_allclose(
        log_probabilities((folder / "predictions.parquet").read_bytes()), log_probabilities(expected.predictions), atol=1e-5
    )
    assert [point.train_loss for point in record.curve] == pytest.approx([p.train_loss for p in expected.record.curve], abs=1e-5)
    assert record.dev_score == expected.record.dev_score and record.draws == expected.record.draws
    assert (record.cost.n_workers, record.cost.micro_batch_tokens) == (2, 100)
    assert (folder / "weights.safetensors").exists()


def first_short_of_memory_then_at_fault(spec: TrialSpec, runtime: Runtime):
    if runtime.rank == 0:
        time.sleep(600)  # as one does that waits for the other
    if runtime.n_out_of_memory == 0:
        raise OutOfMemory("2 GiB too few", runtime.micro_batch_tokens // 2)
    seen = (runtime.micro_batch_tokens, runtime.n_out_of_memory, runtime.world_size, runtime.timeout_s < 300)
    raise TrialFailure(Cause.CRASHED, f"with {seen}")


def test_a_group_starts_again_with_less_memory_and_a_fault_is_a_failed_record(job_of):
    spec, job = job_of("zero_shot", first_short_of_memory_then_at_fault, micro_batch_tokens=150, timeout_s=300)
    run_group(job, PAIR)
    record = Store(job["root"]).get(spec.digest)
    assert (record.status, record.cause) == ("failed", Cause.CRASHED)
    assert record.message == "with (75, 1, 2, True)" and (record.cost.n_workers, record.cost.n_out_of_memory) == (2, 1)


class GroupFailed(Exception):
    """As Ray Train's: what each process raised, by its rank."""

    def __init__(self, *failures: Exception):
        self.worker_failures = dict(enumerate(failures))


def test_of_several_failures_the_one_at_fault_is_told():
    lost, crashed, short = TrialFailure(Cause.LOST, ""), TrialFailure(Cause.CRASHED, ""), OutOfMemory("", 75)
    assert _failure(GroupFailed(lost, crashed)) is crashed
    assert _failure(GroupFailed(crashed, lost, short)) is short  # the others may have failed for want of it
    for of_the_machine in (GroupFailed(lost, lost), GroupFailed(RuntimeError()), GroupFailed()):
        with pytest.raises(GroupFailed):
            _failure(of_the_machine)


def test_a_group_that_the_search_gives_up_is_a_pruned_row_and_leaves_no_reservation(job_of):
    spec, job = job_of("pattern", stop_below={"2": 1.1})
    run_group(job, PAIR)
    record = Store(job["root"]).get(spec.digest)
    assert (record.status, record.cause) == ("failed", Cause.PRUNED) and [point.epoch for point in record.curve] == [1, 2]
    deadline = time.monotonic() + 60
    while left := [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def dies(spec: TrialSpec, runtime: Runtime):
    if runtime.rank == 1:
        os._exit(9)
    time.sleep(600)


def test_a_lost_process_is_for_the_caller_to_retry(job_of):
    spec, job = job_of("zero_shot", dies)
    with pytest.raises(ray.train.TrainingFailedError):
        run_group(job, PAIR)
    assert Store(job["root"]).get(spec.digest) is None


def test_a_group_that_finds_no_room_does_not_wait_for_ever(job_of, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr("sweeps.ray_backend.worker_group.N_STARTS", 1)
    spec, job = job_of("zero_shot")
    with pytest.raises(ray.train.TrainingFailedError):
        run_group(job, SimpleNamespace(n_workers=64, cpus=1, gpus=0))
    assert Store(job["root"]).get(spec.digest) is None


def test_the_loop_in_this_process_is_the_trial(job_of):
    from ray.train.torch import TorchTrainer

    spec, job = job_of("lora", timeout_s=600, stop_below={"1": 0.0}, micro_batch_tokens=None)
    TorchTrainer(train_loop, train_loop_config=job, scaling_config=ray.train.ScalingConfig(num_workers=0)).fit()
    record = Store(job["root"]).get(spec.digest)
    assert record.finished and record.curve == run_trial(spec, Runtime(device="cpu")).record.curve
    assert record.cost.micro_batch_tokens == Runtime().micro_batch_tokens
