"""Trials that meet a limit: memory, time, or what the search asks for."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import pickle
import weakref

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_models import CPU

from llmft.errors import Cause, OutOfMemory
from llmft.models.adapted import AdaptedModel
from llmft.models.batch_planning import (
    PASS_OVERHEAD_TOKENS,
    batch_by_tokens,
    largest_training_step,
    shard_batches,
    smaller_budget,
    split_for_training,
)
from llmft.models.batches import QueryBatch
from llmft.records.record import Cost
from llmft.records.record_files import read_record, write_record
from llmft.trial.run import run_trial

lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def log_probabilities(result) -> np.ndarray:
    return np.array(parquet.read_table(io.BytesIO(result.predictions))["label_log_probabilities"].to_pylist())


@pytest.fixture
def memory_for(monkeypatch):
    """Sets how many prompts fit into memory at once; gives the sizes of all passes tried, and the tensors that the last one made."""
    real, tried, left = AdaptedModel.forward, [], []

    def limit(n_rows: int):
        def forward(self, compute, given):
            if not isinstance(given, QueryBatch):
                return real(self, compute, given)
            tried.append(len(given))
            if len(given) > n_rows:
                activations = torch.zeros(1000)
                left.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            assert not any(tensor() is not None for tensor in left), "the failed attempt's tensors are still there"
            return real(self, compute, given)

        monkeypatch.setattr(AdaptedModel, "forward", forward)
        return tried

    return limit


@pytest.mark.parametrize("method", ["pattern", "lora", "in_context"])
@pytest.mark.parametrize("n_rows", [5, 1])
def test_a_trial_that_runs_out_of_memory_gives_the_same_answer_in_smaller_passes(spec_of, memory_for, method, n_rows):
    spec = spec_of(method, batch_size=16, epsilon=1e-4)
    roomy = run_trial(spec, CPU)
    tried = memory_for(n_rows)
    gc.disable()  # the retry must not hang on the collector's mood
    try:
        tight = run_trial(spec, CPU)
    finally:
        gc.enable()
    assert tight.record.finished, tight.record.message
    np.testing.assert_allclose(log_probabilities(tight), log_probabilities(roomy), atol=1e-5)
    assert [p.train_loss for p in tight.record.curve] == pytest.approx([p.train_loss for p in roomy.record.curve], abs=1e-5)
    cost = tight.record.cost
    assert cost.n_out_of_memory == sum(rows > n_rows for rows in tried) >= 2
    assert cost.micro_batch_tokens < roomy.record.cost.micro_batch_tokens == CPU.micro_batch_tokens
    assert roomy.record.cost.n_out_of_memory == 0


def test_what_fits_in_no_size_is_a_failed_record(spec_of, memory_for):
    tried = memory_for(0)
    record = run_trial(spec_of("pattern", n_shots=8), CPU).record
    assert (record.status, record.cause) == ("failed", Cause.OUT_OF_MEMORY)
    assert tried[0] > 1 and tried[-1] == 1 and tried == sorted(tried, reverse=True)
    assert record.cost.n_out_of_memory == len(tried) - 1 <= 6


def test_a_model_that_does_not_fit_is_not_tried_in_smaller_passes(spec_of):
    placed = []

    def full(adapted):
        placed.append(adapted)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    record = run_trial(spec_of("pattern"), dataclasses.replace(CPU, wrap=full)).record
    assert record.cause is Cause.OUT_OF_MEMORY and len(placed) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), MemoryError()]
)
def test_memory_is_known_by_other_names(spec_of, monkeypatch, error):
    def full(self, compute, given):
        raise error

    monkeypatch.setattr(AdaptedModel, "forward", full)
    record = run_trial(spec_of("lora", n_shots=2, n_test=2, n_dev=0, selections=("last",)), CPU).record
    assert record.cause is Cause.OUT_OF_MEMORY and record.message


def test_the_real_allocators_refusal_is_known():
    from llmft.trial.failures import is_out_of_memory

    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert is_out_of_memory(refused.value)


def test_what_to_try_next_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(OutOfMemory("2 GiB too few", 512)))
    assert (error.cause, error.message, error.smaller) == (Cause.OUT_OF_MEMORY, "2 GiB too few", 512)


def test_records_from_before_still_load(tmp_path, spec_of):
    write_record(tmp_path, run_trial(spec_of("zero_shot"), CPU).record)
    content = json.loads((tmp_path / "record.json").read_text())
    for name in ("micro_batch_tokens", "n_out_of_memory"):
        del content["cost"][name]
    del content["weights_sha256"]
    (tmp_path / "record.json").write_text(json.dumps(content))
    assert read_record(tmp_path).cost.n_out_of_memory == 0 and Cost(wall_s=1).micro_batch_tokens is None


@given(lengths_of, st.integers(1, 200), st.integers(1, 5), st.integers(0, 20))
def test_queries_are_dealt_once_and_evenly(lengths, budget, n, overhead):
    shares = [shard_batches(lengths, budget, rank, n, overhead) for rank in range(n)]
    assert len({len(share) for share in shares}) == 1, "a process that does less leaves the others waiting"
    counted = [i for share in shares for group, counts in share if counts for i in group]
    assert sorted(counted) == list(range(len(lengths)))
    sizes = [sum(len(group) for group, counts in share if counts) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for group, _ in itertools.chain(*shares):
        assert group and ((max(lengths[i] for i in group) + overhead) * len(group) <= budget or len(group) == 1)


@given(st.lists(lengths_of, min_size=1, max_size=3), st.integers(1, 500))
def test_a_smaller_budget_makes_the_largest_pass_smaller_until_all_are_single(sets, budget):
    def passes(budget):
        return [[lengths[i] for i in group] for lengths in sets for group in batch_by_tokens(lengths, budget)]

    def largest(budget):
        return max((max(lengths) * len(lengths) for lengths in passes(budget) if len(lengths) > 1), default=0)

    while smaller := smaller_budget(passes(budget)):
        assert largest(smaller) <= largest(budget) / 2
        budget = smaller
    assert largest(budget) == 0


@given(lengths_of, st.integers(1, 500), st.sampled_from(["cpu", "cuda"]))
def test_the_passes_of_a_step_cost_least(lengths, budget, kind):
    """Against all ways to cut the examples, in order of length, into passes."""
    lengths = lengths[:9]
    per_pass = {"cpu": 64, "cuda": 1024}[kind]
    groups = split_for_training(lengths, budget, torch.device(kind))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in group) * len(group) <= budget for group in groups if len(group) > 1)

    def cost(parts):
        return sum(max(part) * len(part) + per_pass for part in parts)

    ordered, ways = sorted(lengths, reverse=True), []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [i for i, cut in enumerate(cuts, 1) if cut] + [len(lengths)]
        parts = [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if all(max(part) * len(part) <= budget or len(part) == 1 for part in parts):
            ways.append(cost(parts))
    assert cost([[lengths[i] for i in group] for group in groups]) == min(ways)
    lengths_in_order = [lengths[i] for group in groups for i in group]
    assert lengths_in_order == ordered


@given(lengths_of, st.integers(1, 12), st.integers(1, 500), st.randoms())
def test_no_step_has_a_larger_pass_than_the_hardest(lengths, batch_size, budget, shuffled):
    """But for its rounding: steps are looked at in strides of a quarter."""
    cpu, ordered = torch.device("cpu"), sorted(lengths, reverse=True)

    def largest(of, groups):
        return max(max(of[i] for i in group) * len(group) for group in groups)

    hardest = largest(ordered, largest_training_step(ordered, batch_size, budget, cpu))
    shuffled.shuffle(lengths)
    step = lengths[:batch_size]
    assert largest(step, split_for_training(step, budget, cpu)) <= hardest + max(lengths) * (batch_size // 4 + 1)


class Clock:
    def __init__(self, monkeypatch, step_s: float = 1.0):
        self.now, self.step_s = 100.0, step_s
        monkeypatch.setattr("llmft.runtime.time.monotonic", self.tick)

    def tick(self) -> float:
        self.now += self.step_s
        return self.now


def test_a_trial_that_takes_too_long_is_a_failed_record_with_its_curve(spec_of, monkeypatch):
    spec = spec_of("pattern", epochs=50, n_test=4)
    Clock(monkeypatch)
    record = run_trial(spec, dataclasses.replace(CPU, timeout_s=10.5)).record
    assert (record.status, record.cause, record.metrics) == ("failed", Cause.TIMEOUT, {})
    assert "10.5 s" in record.message
    # it looks at the clock twice an epoch before a step and once before its one pass over dev: the eleventh look is too late
    assert [point.epoch for point in record.curve] == [1, 2, 3] and record.cost.n_steps == 7
    assert record.dev_score["last"] == record.curve[-1].dev_score
    assert record.dev_score["best_dev"] == max(point.dev_score for point in record.curve)


def test_the_clock_runs_during_evaluation_and_across_attempts(spec_of, monkeypatch, memory_for):
    Clock(monkeypatch)
    few = dataclasses.replace(CPU, timeout_s=5, micro_batch_tokens=40)
    assert run_trial(spec_of("zero_shot"), few).record.cause is Cause.TIMEOUT
    tried = memory_for(0)
    record = run_trial(spec_of("zero_shot", n_shots=0), dataclasses.replace(CPU, timeout_s=2.5)).record
    assert record.cause is Cause.TIMEOUT and len(tried) == 2 and record.cost.n_out_of_memory == 2


def test_a_trial_in_time_is_the_trial_without_a_limit(spec_of):
    spec = spec_of("lora")
    limited, free = run_trial(spec, dataclasses.replace(CPU, timeout_s=600)), run_trial(spec, CPU)
    assert limited.predictions == free.predictions and limited.record.curve == free.record.curve


def test_what_does_worse_than_asked_is_given_up(spec_of):
    spec = spec_of("pattern", epochs=6, learning_rate=1e-2, n_dev=10)
    whole = run_trial(spec, CPU).record
    best = list(itertools.accumulate((point.dev_score for point in whole.curve), max))
    heard = []
    floor = {2: best[1], 4: best[3] + 0.01, 6: 2.0}
    pruned = run_trial(spec, dataclasses.replace(CPU, stop_below=floor, report=heard.append)).record
    assert (pruned.status, pruned.cause) == ("failed", Cause.PRUNED)
    assert pruned.curve == whole.curve[:4] and len(heard) == 4
    assert pruned.dev_score == {"last": whole.curve[3].dev_score, "best_dev": best[3]}
    assert json.loads(pruned.model_dump_json())["provenance"]["stop_below"] == {str(k): v for k, v in floor.items()}
    assert f"{best[3]:.3f}" in pruned.message
    kept = run_trial(spec, dataclasses.replace(CPU, stop_below=dict(enumerate(best, 1)))).record  # equal is enough
    assert kept.finished and kept.curve == whole.curve


def test_a_diverged_trial_keeps_its_curve(spec_of, monkeypatch):
    real, n_losses = AdaptedModel.forward, itertools.count()

    def forward(self, compute, given):
        value = real(self, compute, given)
        return value * float("nan") if compute.__name__ == "loss" and next(n_losses) == 5 else value

    monkeypatch.setattr(AdaptedModel, "forward", forward)
    monkeypatch.setitem(PASS_OVERHEAD_TOKENS, "cpu", 10**6)  # one pass a step
    record = run_trial(spec_of("pattern", epochs=5), CPU).record
    assert record.cause is Cause.DIVERGED and [point.epoch for point in record.curve] == [1, 2]
    assert set(record.dev_score) == {"last", "best_dev"} and record.cost.n_steps == 5
