from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.small_models import CPU
from support.training import largest_difference, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.config.patterns import Pattern
from llmft.errors import Cause, UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._registry import build_method
from llmft.methods.pattern import PatternBased
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import borrow_model
from llmft.prompting.encoding import SHORTEST_PREFIX
from llmft.runtime import Runtime
from llmft.seeds import stream
from llmft.tasks._registry import load_task
from llmft.training import loop
from llmft.training.checkpoints import TrainingResult
from llmft.training.loop import learning_rate_factor, n_warmup_steps
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import check_spec, run_trial

STEADY = {"epsilon": 1e-4}  # a gradient of rounding noise alone must not become a full step


def finished(spec, runtime: Runtime = CPU):
    record = run_trial(spec, runtime).record
    assert record.finished, record.message
    return record


@given(ratio=st.floats(1e-4, 1), n_steps=st.integers(1, 5000))
def test_a_small_training_is_never_without_warm_up_by_accident(ratio, n_steps):
    n_warmup = n_warmup_steps(ratio, n_steps)
    assert 1 <= n_warmup <= n_steps
    assert abs(n_warmup - ratio * n_steps) < 1


@pytest.mark.parametrize(("ratio", "n_steps", "expected"), [(0, 100, 0), (0.1, 5, 1), (0.1, 10, 1), (0.1, 30, 3), (0.1, 31, 4), (1, 7, 7)])
def test_warm_up_by_hand(ratio, n_steps, expected):
    assert n_warmup_steps(ratio, n_steps) == expected


@pytest.mark.parametrize("n_warmup", [0, 1, 4, 20])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedules_are_those_of_transformers_with_warm_up_one_step_ahead(schedule, n_warmup):
    n_steps = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    lengths = {"num_warmup_steps": n_warmup} | ({} if schedule == "constant" else {"num_training_steps": n_steps})
    theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, **lengths).lr_lambdas[0]
    for step in range(n_steps):
        expected = theirs(step + 1) if step + 1 < n_warmup else 1.0 if step < n_warmup else theirs(step)
        assert learning_rate_factor(step, n_steps, n_warmup, schedule) == pytest.approx(expected)
    assert learning_rate_factor(0, n_steps, n_warmup, schedule) > 0  # no step is wasted on a rate of zero


def train_by_hand(spec) -> dict[str, torch.Tensor]:
    """Pattern-based fine-tuning with plain transformers, one whole prompt at a time; the words are ' Yes' and ' No'."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(spec.model.path), AutoTokenizer.from_pretrained(spec.model.path)
    shots = prepare_trial(spec).draw.shots
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" Yes", " No")]
    prompts = [tokenizer(f"{shot.fields['premise']} {shot.fields['hypothesis']} ?", return_tensors="pt") for shot in shots]
    hyper = spec.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=hyper.learning_rate,
        betas=(hyper.beta1, hyper.beta2),
        eps=hyper.epsilon,
        weight_decay=hyper.weight_decay,
    )
    n_steps, step, order = math.ceil(len(shots) / hyper.batch_size) * hyper.epochs, 0, stream(spec.order_seed, "batches")
    n_warmup = math.ceil(hyper.warmup_ratio * n_steps)
    for _ in range(hyper.epochs):
        shuffled = order.permutation(len(shots)).tolist()
        while shuffled:
            batch, shuffled = shuffled[: hyper.batch_size], shuffled[hyper.batch_size :]
            losses = [-model(**prompts[i]).logits[0, -1].log_softmax(-1)[words[shots[i].label]] for i in batch]
            torch.stack(losses).mean().backward()
            if hyper.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.clip_norm)
            optimizer.param_groups[0]["lr"] = hyper.learning_rate * min(1.0, (step + 1) / n_warmup)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("clip_norm", [0.5, None])  # clipping hides a wrong scale of the loss
def test_the_loop_equals_one_written_by_hand(spec_of, clip_norm):
    spec = spec_of("pattern", n_shots=12, epochs=3, batch_size=8, warmup_ratio=0.4, weight_decay=0.01, clip_norm=clip_norm, **STEADY)
    result, weights = train(spec)
    assert result.n_steps == 6
    assert largest_difference(weights, train_by_hand(spec)) < 1e-5
    untrained = AutoModelForCausalLM.from_pretrained(spec.model.path).requires_grad_(False)
    assert largest_difference(weights, dict(untrained.named_parameters())) > 1e-3


@pytest.mark.parametrize("method", ["pattern", "vanilla", "lora"])
def test_small_forward_passes_give_the_weights_of_one_batch(spec_of, method):
    spec = spec_of(method, n_shots=20, batch_size=16, epochs=3, **STEADY)  # the last batch has 4 examples
    whole, weights = train(spec)
    _, in_parts = train(spec, dataclasses.replace(CPU, micro_batch_tokens=40))
    assert largest_difference(weights, in_parts) < 1e-5
    assert whole.n_steps == 6


def test_gradient_checkpointing_gives_the_same_weights(spec_of):
    for method, dropout in (("pattern", None), ("lora", 0.1)):
        plain = train(spec_of(method, dropout=dropout, **STEADY))[1]
        assert largest_difference(plain, train(spec_of(method, dropout=dropout, gradient_checkpointing=True, **STEADY))[1]) < 1e-6


SEEDS = ("order_seed", "init_seed", "dropout_seed")
MATTERS = {  # what changes the weights of: a method, its dropout and its batch size
    ("pattern", None, 8): {"order_seed"},
    ("pattern", 0.2, 8): {"order_seed", "dropout_seed"},
    ("vanilla", None, 8): {"order_seed", "init_seed"},
    ("lora", 0.2, 8): {"order_seed", "init_seed", "dropout_seed"},
}


@pytest.mark.parametrize(("method", "dropout", "batch_size"), MATTERS)
def test_each_seed_changes_what_it_names_and_nothing_else(spec_of, method, dropout, batch_size):
    spec = spec_of(method, dropout=dropout, batch_size=batch_size)
    weights = train(spec)[1]
    torch.rand(3)  # whatever ran before does not count
    assert largest_difference(weights, train(spec)[1]) == 0
    changes = {seed for seed in SEEDS if largest_difference(weights, train(spec.model_copy(update={seed: 1}))[1]) > 0}
    assert changes == MATTERS[method, dropout, batch_size]


def test_training_leaves_the_callers_randomness_alone(spec_of):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(spec_of("lora", dropout=0.2))
    assert torch.rand(1) == expected


def test_nothing_encoded_before_a_step_is_used_after_it(spec_of, monkeypatch):
    task = load_task("toy")
    opening = Pattern(template="doctors saw lawyers and lawyers saw doctors and so on {premise} {hypothesis} ?", verbalizer="yes-no")
    monkeypatch.setattr(type(task), "patterns", {**task.patterns, "minimal": opening})
    spec = spec_of("pattern", selections=("last",))
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    assert len(encoded.prefix) > 2 * SHORTEST_PREFIX
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        setting.method.prepare(model, 2, torch.Generator())
        adapted, result = AdaptedModel(setting.method, model), TrainingResult()
        evaluators = [Evaluator(adapted, encoded, setting.words, CPU) for _ in range(2)]
        untrained = evaluators[0].predict("toy").log_probabilities
        loop.train(spec, setting.recipe, adapted, evaluators[0], {"toy": "in"}, result)
        fresh = evaluators[1].predict("toy").log_probabilities
    assert np.abs(fresh - untrained).max() > 0.01
    np.testing.assert_array_equal(result.checkpoints["last"].predictions["toy"].log_probabilities, fresh)


def best(curve) -> int:
    """The step of the highest dev accuracy; of equals the lowest loss; of those the first."""
    chosen = curve[0]
    for point in curve[1:]:
        higher = point.dev_score > chosen.dev_score
        if higher or (point.dev_score == chosen.dev_score and point.dev_loss < chosen.dev_loss):
            chosen = point
    return chosen.step


def wavering(spec_of, seed: int, **changed):
    """A training whose dev accuracy goes up and down."""
    return spec_of("pattern", epochs=8, learning_rate=1e-2, n_dev=10, n_test=24, **changed).with_seed(seed)


def test_best_dev_is_the_best_point_of_the_curve_and_predicts_with_its_weights(spec_of):
    early = 0
    for seed in range(3):
        record = finished(wavering(spec_of, seed))
        step = record.selected_step["best_dev"]
        assert step == best(record.curve) and record.selected_step["last"] == record.curve[-1].step == 16
        (point,) = [point for point in record.curve if point.step == step]
        assert (record.dev_score["best_dev"], record.dev_loss["best_dev"]) == (point.dev_score, point.dev_loss)
        seen = []
        stop = dataclasses.replace(CPU, report=seen.append, should_stop=lambda seen=seen, epoch=point.epoch: len(seen) >= epoch - 1)
        stopped = finished(wavering(spec_of, seed), stop)
        assert stopped.curve[-1].step == step
        assert stopped.metrics["last"] == record.metrics["best_dev"]
        early += step < 16
    assert early, "no training had its best state before its last: nothing was tested"


def test_ties_in_accuracy_go_to_the_lower_loss(spec_of, monkeypatch):
    looks = iter([(0.5, 0.9), (0.75, 0.6), (0.75, 0.4), (0.75, 0.4), (0.75, 0.5)])
    real = Evaluator.predict

    class Planted:
        def __init__(self):
            self.score, self.loss = next(looks)
            self.rank = self.score, -self.loss

    monkeypatch.setattr(Evaluator, "predict", lambda self, name: Planted() if name == "dev" else real(self, name))
    record = finished(spec_of("lora", epochs=5))
    assert [point.step for point in record.curve] == [2, 4, 6, 8, 10]
    assert record.selected_step["best_dev"] == 6
    assert (record.dev_score["best_dev"], record.dev_loss["best_dev"]) == (0.75, 0.4)


def test_oracles_are_never_worse_than_the_last_state_on_their_set(spec_of):
    gained = 0.0
    for seed in range(3):
        record = finished(wavering(spec_of, seed, selections=("last", "best_in_domain", "best_out_of_domain")))
        for oracle, name in (("best_in_domain", "toy"), ("best_out_of_domain", "toy_hans")):
            gain = record.metrics[oracle][name].accuracy - record.metrics["last"][name].accuracy
            assert gain >= 0
            gained += gain
        assert set(record.metrics) == {"last", "best_in_domain", "best_out_of_domain"}
    assert gained > 0


def test_only_the_asked_selections_are_reported(spec_of):
    assert set(finished(spec_of("pattern", selections=("best_dev",))).metrics) == {"best_dev"}
    assert set(finished(spec_of("pattern", selections=("last",), n_dev=0)).metrics) == {"last"}


def test_a_search_trial_scores_dev_alone(spec_of):
    searched, reported = finished(spec_of("lora", test_sets=())), finished(spec_of("lora"))
    assert searched.dev_score == reported.dev_score and searched.curve == reported.curve
    assert all(by_set == {} for by_set in searched.metrics.values())
    assert {finding.set for finding in searched.findings} <= {None, "dev"}
    assert 0 < searched.cost.tokens_evaluated < reported.cost.tokens_evaluated
    assert finished(spec_of("in_context", test_sets=())).dev_score == finished(spec_of("in_context")).dev_score


def test_the_curve_is_looked_at_as_often_as_asked_and_at_the_end(spec_of):
    record = finished(spec_of("lora", epochs=5, eval_every_epochs=2))
    assert [point.epoch for point in record.curve] == [2, 4, 5]
    assert record.cost.n_steps == 10


def test_a_runtime_hears_of_every_look_and_can_stop(spec_of):
    heard = []
    record = finished(spec_of("lora", epochs=6), dataclasses.replace(CPU, report=heard.append, should_stop=lambda: len(heard) == 2))
    assert [progress["epoch"] for progress in heard] == [1, 2, 3]
    assert [progress["dev_score"] for progress in heard] == [point.dev_score for point in record.curve]


@pytest.mark.parametrize("learning_rate", [10.0, 1e5, 1e30])
@pytest.mark.parametrize("method", ["pattern", "vanilla", "lora"])
def test_a_learning_rate_that_ruins_the_model_is_told(spec_of, method, learning_rate):
    record = run_trial(spec_of(method, learning_rate=learning_rate, epochs=3), CPU).record
    suspicious = {"loss_did_not_fall", "constant_prediction", "near_constant_prediction", "chance_level"}
    assert record.cause is Cause.DIVERGED or suspicious & {finding.code for finding in record.findings}


def test_a_nan_loss_is_a_failed_record(spec_of, monkeypatch):
    monkeypatch.setattr(PatternBased, "loss", lambda self, model, batch: self.scores(model, batch).labels.mean() * math.nan)
    record = run_trial(spec_of("pattern"), CPU).record
    assert (record.status, record.cause, record.metrics) == ("failed", Cause.DIVERGED, {})
    assert "step 1 of 4" in record.message


def test_a_weight_that_turns_nan_in_the_last_step_is_a_failed_record(spec_of, monkeypatch):
    real = torch.optim.AdamW.step

    def poisoned(self, *arguments, **named):
        real(self, *arguments, **named)
        self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    record = run_trial(spec_of("pattern", epochs=1, batch_size=16), CPU).record
    assert (record.status, record.cause, record.metrics) == ("failed", Cause.DIVERGED, {})


def test_nan_scores_without_training_are_a_failed_record(spec_of, monkeypatch):
    method = type(build_method("zero_shot", {}))
    real = method.scores

    def poisoned(self, model, batch):
        scores = real(self, model, batch)
        scores.labels[0, 0] = math.nan
        return scores

    monkeypatch.setattr(method, "scores", poisoned)
    record = run_trial(spec_of("zero_shot"), CPU).record
    assert (record.status, record.cause) == ("failed", Cause.DIVERGED)


def test_bf16_runs_on_a_cpu_near_fp32(spec_of):
    full, half = (finished(spec_of("zero_shot", precision=precision)) for precision in ("fp32", "bf16"))
    assert half.metrics["none"]["toy"].loss == pytest.approx(full.metrics["none"]["toy"].loss, abs=0.1)
    assert half.metrics["none"]["toy"].loss != full.metrics["none"]["toy"].loss
    for method in ("pattern", "lora", "vanilla"):
        assert np.isfinite(finished(spec_of(method, precision="bf16")).metrics["last"]["toy"].loss)


def test_fp16_without_cuda_is_refused(spec_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        check_spec(spec_of("pattern", precision="fp16"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"pattern": "minimall"}, "Did you mean 'minimal'"), ({"verbalizer": "yesno"}, "Did you mean 'yes-no'"),
     ({"test_sets": ("toy_han",)}, "Did you mean 'toy_hans'"), ({"n_shots": 3}, "cannot be balanced"), ({"n_shots": 0}, "zero_shot"),
     ({"max_length": 5000}, "context of 512"), ({"task": "toys"}, "Did you mean 'toy'"), ({"n_dev": 5000}, "training pool")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_mistakes_are_found_before_any_weight_is_loaded(spec_of, monkeypatch, changed, said):
    spec = spec_of("pattern").model_copy(update=changed)
    monkeypatch.setattr("llmft.trial.run.borrow_model", None)
    with pytest.raises(UserError, match=said):
        check_spec(spec)
    assert run_trial(spec, CPU).record.cause is Cause.USER_ERROR


def test_what_nobody_foresaw_is_a_failed_record(spec_of, monkeypatch):
    monkeypatch.setattr(PatternBased, "loss", lambda self, model, batch: 1 / 0)
    record = run_trial(spec_of("pattern"), CPU).record
    assert (record.status, record.cause) == ("failed", Cause.CRASHED)
    assert record.message == "ZeroDivisionError: division by zero"


def test_no_memory_is_a_failed_record_with_its_cause(spec_of, monkeypatch):
    def full(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(PatternBased, "loss", full)
    assert run_trial(spec_of("pattern"), CPU).record.cause is Cause.OUT_OF_MEMORY


def test_the_shots_are_what_is_trained_on(spec_of):
    spec = spec_of("pattern")
    shown = {example.id: example for example in load_task("toy").load(spec.data).pool}
    record = finished(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.path)
    texts = [f"{shown[id].fields['premise']} {shown[id].fields['hypothesis']} ?" for id in record.draws.shots]
    assert record.cost.tokens_trained == 2 * sum(len(tokenizer(text)["input_ids"]) for text in texts)
