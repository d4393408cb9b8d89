"""A trial by two processes against the same trial by one."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load
from support.process_group import Run, run_in_group, scaled_step, second_dies, second_has_no_memory, seeds_used
from support.small_models import CPU, save_model, t5_tokenizer, toy_text

from llmft.config.spec import GenerationSpec
from llmft.errors import Cause
from llmft.models.info import resolve_model
from llmft.seeds import derive
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

FEW_AT_ONCE = {"micro_batch_tokens": 40}
DISTILLED = {"n_unlabelled": 9, "distil_shots": True, "cross_entropy_weight": 0.5, "over": "top_k", "k": 9}

RECURSIVE = {"n_unlabelled": 9, "distil_shots": True, "cross_entropy_weight": 0.5, "rounds": 2, "only_correct": True, "student": "lora"}


def table(result) -> dict[tuple, np.ndarray]:
    """(selection, set, id) -> log-probabilities of the labels, or the characters of a generated text."""
    rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    answers = (row["label_log_probabilities"] if "label" in row else [*map(ord, row["text"].ljust(200))] for row in rows)
    return {(row["selection"], row["set"], row["id"]): np.array(answer) for row, answer in zip(rows, answers, strict=True)}


def assert_same(result, expected, atol: float = 1e-5) -> None:
    got, wanted = table(result), table(expected)
    assert got.keys() == wanted.keys()
    assert max(np.abs(got[key] - wanted[key]).max() for key in wanted) < atol
    ours, theirs = result.record, expected.record
    assert [(point.step, point.epoch) for point in ours.curve] == [(point.step, point.epoch) for point in theirs.curve]
    for name in ("train_loss", "dev_score", "dev_loss", "learning_rate"):
        assert [getattr(p, name) for p in ours.curve] == pytest.approx([getattr(p, name) for p in theirs.curve], abs=atol)
    assert (ours.selected_step, ours.draws, ours.dev_score) == (theirs.selected_step, theirs.draws, theirs.dev_score)
    assert ours.weight_distance == pytest.approx(theirs.weight_distance, rel=1e-4, abs=1e-7)
    for name in ("tokens_trained", "n_parameters", "n_trainable_parameters", "stored_bytes", "n_steps", "tokens_per_query"):
        assert getattr(ours.cost, name) == getattr(theirs.cost, name), name


@pytest.fixture(scope="module")
def runs(spec_of, tmp_path_factory):
    """What is compared. With a steady epsilon: a gradient of rounding noise alone must not become a full step."""

    def run(method: str, runtime: dict | None = None, before=None, of_method: dict | None = None, **changed) -> Run:
        spec = spec_of(method, of_method, **{"epsilon": 1e-4, "n_dev": 7, "n_test": 14} | changed)
        return Run(spec, runtime or {}, before)

    every = ("last", "best_dev", "best_in_domain", "best_out_of_domain")
    t5 = save_model(tmp_path_factory.mktemp("models") / "t5", "t5", t5_tokenizer(toy_text()))
    early = {"epochs": 6, "learning_rate": 1e-2, "n_dev": 10, "n_shots": 12}
    return {
        "vanilla": run("vanilla"),
        "pattern": run("pattern", weight_decay=0.01, clip_norm=0.5),
        "lora": run("lora"),
        "ia3": run("ia3"),
        "adapter": run("adapter_parallel", {"micro_batch_tokens": 80}, batch_size=16, gradient_checkpointing=True),
        "in context": run("in_context"),
        "encoder and decoder": run("pattern", {"micro_batch_tokens": 300}, model=resolve_model(t5)),
        "distillation": run("context_distillation", {"micro_batch_tokens": 200}, of_method=DISTILLED),
        "distilled prompt": run("context_distillation", {"keep_weights": True}, of_method={**DISTILLED, "student": "p_tuning"}),
        "recursive distillation": run("context_distillation", {"micro_batch_tokens": 200}, of_method=RECURSIVE),
        "dora": run("lora", of_method={"dora": True, "targets": ["q_proj", "fc1"]}),
        "a last batch of one": run("pattern", n_shots=6, batch_size=5),
        "a dev set of one": run("pattern", n_dev=1, n_test=4),
        "many passes": run("pattern", FEW_AT_ONCE, batch_size=16, clip_norm=None),
        "many passes of lora": run("lora", FEW_AT_ONCE, batch_size=16),
        "many passes in context": run("in_context", {"micro_batch_tokens": 600}),
        "checkpointed": run("pattern", gradient_checkpointing=True),
        "best is early": run("pattern", {"keep_weights": True}, **early),
        "patience": run("pattern", patience=2, **early),
        "rates by depth, untied": run("pattern", of_method={"untie_embeddings": True}, layer_decay=0.3),
        "oracles": run("lora", selections=every),
        "texts": run("pattern", FEW_AT_ONCE, task="toy_text", generation=GenerationSpec(max_new_tokens=12)),
        "texts in context": run("in_context", task="toy_text", generation=GenerationSpec(max_new_tokens=12, stop=())),
        "prompt": run("prompt_tuning"),
        "encoded prompt": run("p_tuning", {"keep_weights": True}),
        "prefix": run("prefix_tuning"),
        "l2_sp": run("regularised"),
        "ewc": run("regularised", FEW_AT_ONCE, of_method={"penalty": "ewc", "strength": 3.0, "n_fisher_samples": 5}, dropout=0.0),
        "kl_to_base": run("regularised", FEW_AT_ONCE, of_method={"penalty": "kl_to_base"}),
        "fine-tuned in context": run("finetuned_in_context"),
        "half": run("pattern", precision="bf16"),
        "half in context": run("in_context", precision="bf16"),
        "dropout": run("pattern", before=seeds_used, epochs=1, dropout=0.3),
        "diverged": run("pattern", before=scaled_step, learning_rate=1e30, clip_norm=None),
        "pruned": run("pattern", {"stop_below": {1: 1.01}}),
        "late": run("pattern", {"timeout_s": 0.0}),
    }


NOT_EQUAL = ("half", "half in context", "dropout", "diverged", "pruned", "late")


@pytest.fixture(scope="module")
def alone(runs):
    return {name: run_trial(run.spec, dataclasses.replace(CPU, **run.settings)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def ended(runs, tmp_path_factory):
    """strategy -> what its two processes got: from all trials, and from a last one, which ends the group."""
    last = {"ddp": second_has_no_memory, "fsdp": second_dies}
    return {
        strategy: run_in_group(tmp_path_factory.mktemp(strategy), strategy, {**runs, "last": Run(runs["many passes"].spec, before=before)})
        for strategy, before in last.items()
    }


@pytest.fixture(params=["ddp", "fsdp"])
def together(request, ended):
    return ended[request.param]


def test_two_processes_predict_what_one_does(together, alone, runs):
    for name in runs.keys() - NOT_EQUAL:
        for got in together:
            assert_same(got[name], alone[name])
            assert got[name].record.cost.n_workers == 2
    assert alone["best is early"].record.selected_step["best_dev"] < alone["best is early"].record.selected_step["last"]
    assert len(alone["patience"].record.curve) < len(alone["best is early"].record.curve)


def test_every_process_knows_the_teacher_of_each_round(together, alone):
    for got in together:
        ours, theirs = (each["recursive distillation"].record.teacher for each in (got, alone))
        assert ours.rounds == theirs.rounds and len(ours.rounds) == 2
        assert theirs.rounds[0].n_trusted < theirs.rounds[0].n_asked


def test_half_precision_is_near(together, alone):
    for got in together:
        for name in ("half", "half in context"):
            ours, theirs = table(got[name]), table(alone[name])
            assert max(np.abs(ours[key] - theirs[key]).max() for key in theirs) < 0.1


def test_tokens_are_those_of_all_processes(together, alone, runs):
    spec = runs["in context"].spec
    prefix = encode_prompts(spec, prepare_trial(spec)).prefix  # which each process encodes for itself
    for name, n_more in (("pattern", 0), ("in context", len(prefix))):
        first, second = (got[name].record.cost.tokens_evaluated for got in together)
        assert first == second == alone[name].record.cost.tokens_evaluated + n_more
    assert len(prefix) > 100


def test_each_process_draws_its_own_dropout(together, alone, runs):
    first, second = (got["dropout"].record for got in together)
    assert first.finished and first.curve == second.curve
    assert first.curve[0].train_loss == pytest.approx(alone["dropout"].record.curve[0].train_loss, rel=0.5)
    (first,), (second,) = (got["seeds_used"] for got in together)
    assert first == derive(runs["dropout"].spec.dropout_seed, "dropout") != second


def test_all_processes_stop_together_and_keep_the_curve(together, alone):
    for got in (*together, alone):
        for name, cause in (("diverged", Cause.DIVERGED), ("pruned", Cause.PRUNED), ("late", Cause.TIMEOUT)):
            assert (got[name].record.status, got[name].record.cause) == ("failed", cause), got[name].record.message
        assert len(got["pruned"].record.curve) == 1


def test_the_kept_weights_are_whole_and_come_once(together, alone):
    expected = load(alone["best is early"].weights)
    first, second = (got["best is early"].weights for got in together)
    assert second is None
    kept = load(first)
    assert kept.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, atol=1e-5, rtol=0)


def test_an_overflow_in_one_shard_stops_the_step_in_all(together):
    """Of a sharded model; see `scaled_step`."""
    assert [got["scaled_step"] for got in together] == [(True, True)] * 2


def test_a_process_without_memory_says_what_to_try(ended):
    lost, failed = (got["last"] for got in ended["ddp"])
    assert lost.cause is Cause.LOST
    assert failed.cause is Cause.OUT_OF_MEMORY and 0 < failed.smaller < 8 * 30  # tokens: less than its eight queries had


def test_a_process_that_dies_is_told_from_one_that_fails(ended):
    left, dead = ended["fsdp"]
    assert "late" in dead and "last" not in dead
    assert left["last"].cause is Cause.LOST and "another process of the group ended" in left["last"].message
