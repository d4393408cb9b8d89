from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from support.small_models import CPU

from llmft.config.spec import FileRef, ForgettingSpec
from llmft.errors import Cause, UserError
from llmft.evaluation.perplexity import text_likelihood
from llmft.methods._registry import build_method
from llmft.models.loading import borrow_model
from llmft.records.record import Measure
from llmft.tasks._toy_language import toy_data
from llmft.trial import forgetting
from llmft.trial.forgetting import measure_base, pair, resolve_forgetting
from llmft.trial.run import check_spec, run_trial

TEXT = " \n".join(pair.premise for pair in toy_data().train[:50])
TRAIN = {"epochs": 3, "learning_rate": 1e-2}


@pytest.fixture
def wanted(tmp_path) -> ForgettingSpec:
    (tmp_path / "some.txt").write_text(TEXT)
    return resolve_forgetting(tasks=["toy"], text=str(tmp_path / "some.txt"), limit=30)


@pytest.fixture(autouse=True)
def nothing_remembered():
    forgetting._OF_BASE.clear()


@pytest.mark.parametrize("name", ["pattern", "lora"])
def test_a_trial_says_what_the_model_could_before_and_can_after(spec_of, wanted, name):
    spec = spec_of(name, forgetting=wanted, **TRAIN)
    record = run_trial(spec, CPU).record
    assert record.finished and record.cost.forgetting_s > 0
    numbers = {change.after.key: change for change in record.forgetting}
    assert {key[:2] for key in numbers} == {("llmft", "toy"), ("text", "some.txt")}
    # independent: an ordinary zero-shot trial on the base model, and on the text the model of transformers itself
    alone = run_trial(spec_of("zero_shot", n_shots=0, n_dev=0, n_test=30, selections=("none",)), CPU).record
    accuracy = numbers["llmft", "toy", "accuracy"]
    assert (accuracy.before.value, accuracy.before.n) == (alone.metrics["none"]["toy"].accuracy, 30)
    perplexity = numbers["text", "some.txt", "token_perplexity"]
    assert perplexity.after.value != pytest.approx(perplexity.before.value, rel=1e-3)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_a_learned_prompt_stands_in_front_of_what_all_queries_share(spec_of, wanted, monkeypatch, name):
    monkeypatch.setattr("llmft.prompting.encoding.SHORTEST_PREFIX", 1)
    record = run_trial(spec_of(name, forgetting=wanted, **TRAIN), CPU).record
    assert record.finished, record.message


def test_the_numbers_after_are_those_of_the_kept_weights(spec_of, wanted, tmp_path):
    """`best_dev` lies before the last step here, and is what is kept and measured."""
    from llmft.models.adapted import AdaptedModel
    from llmft.models.loading import load_tokenizer
    from llmft.trial.weights import restored

    early = {"epochs": 8, "learning_rate": 1e-2, "n_dev": 10, "n_test": 24, "selections": ("last", "best_dev")}
    spec = spec_of("pattern", forgetting=wanted, **early).with_seed(1)
    result = run_trial(spec, dataclasses.replace(CPU, keep_weights=True))
    assert result.record.selected_step["best_dev"] < result.record.selected_step["last"]
    (tmp_path / "weights.safetensors").write_bytes(result.weights)
    found = {change.after.metric: change for change in result.record.forgetting}
    with restored(spec, tmp_path / "weights.safetensors", torch.device("cpu")) as adapted:
        kept = text_likelihood(adapted, load_tokenizer(spec.model), TEXT, 512)
        moved = copy.deepcopy(adapted.network)
    assert found["token_perplexity"].after.value == pytest.approx(kept.token_perplexity, rel=1e-5)
    with borrow_model(spec.model, "fp32", torch.device("cpu"), copied=False) as model:
        base = text_likelihood(AdaptedModel(build_method("zero_shot", {}), model), load_tokenizer(spec.model), TEXT, 512)
        squares = [(a - b).detach().square().sum() for a, b in zip(moved.parameters(), model.network.parameters(), strict=True)]
    assert found["token_perplexity"].before.value == pytest.approx(base.token_perplexity, rel=1e-5)
    assert result.record.weight_distance["best_dev"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_a_new_head_can_be_asked_nothing_but_how_far_the_rest_has_moved(spec_of, wanted):
    record = run_trial(spec_of("vanilla", forgetting=wanted, **TRAIN), CPU).record
    assert record.finished and record.forgetting == [] and record.weight_distance["last"] > 0


@pytest.mark.parametrize("name", ["zero_shot", "in_context"])
def test_what_trains_nothing_forgets_nothing(spec_of, wanted, name):
    record = run_trial(spec_of(name, forgetting=wanted, selections=("none",)), CPU).record
    assert record.finished and len(record.forgetting) == 5
    assert all(change.before == change.after for change in record.forgetting)


def test_measuring_changes_no_answer_and_the_base_is_measured_once(spec_of, wanted, monkeypatch):
    measured = []
    monkeypatch.setattr(forgetting, "measure", lambda *given: measured.append(given) or [])
    for seed in (0, 1):
        with_it = run_trial(spec_of("lora", forgetting=wanted, **TRAIN).with_seed(seed), CPU)
        without = run_trial(spec_of("lora", **TRAIN).with_seed(seed), CPU)
        assert with_it.predictions == without.predictions and with_it.record.curve == without.record.curve
        assert with_it.record.cost.tokens_evaluated == without.record.cost.tokens_evaluated
    assert len(measured) == 1
    measure_base(spec_of("lora").model_copy(update={"precision": "bf16"}), wanted, CPU, torch.device("cpu"))
    assert len(measured) == 2
    assert without.record.forgetting == [] and without.record.weight_distance == with_it.record.weight_distance


def test_a_group_of_processes_is_refused_before_it_trains(spec_of, wanted):
    with pytest.raises(UserError, match="forgetting: is measured by one process"):
        forgetting.check_alone(spec_of("lora", forgetting=wanted), dataclasses.replace(CPU, world_size=2))


def test_mistakes_are_found_before_the_trial(spec_of, tmp_path, wanted):
    with pytest.raises(UserError, match="unknown task 'tay'. Did you mean 'toy'"):
        resolve_forgetting(tasks=["tay"])
    with pytest.raises(UserError, match=r"text: .*none\.txt cannot be read"):
        resolve_forgetting(text=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        resolve_forgetting(text=str(tmp_path / "empty.txt"))
    gone = wanted.model_copy(update={"text": FileRef(path=str(tmp_path / "gone.txt"))})
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        check_spec(spec_of("lora", forgetting=gone))
    assert run_trial(spec_of("lora", forgetting=gone), CPU).record.cause is Cause.USER_ERROR


def test_contents_count_for_the_digest_and_places_do_not(spec_of, wanted, tmp_path):
    spec = spec_of("lora", forgetting=wanted)

    def with_text(text: str, name: str) -> str:
        (tmp_path / name).write_text(text)
        again = resolve_forgetting(tasks=["toy"], text=str(tmp_path / name), limit=30)
        return spec.model_copy(update={"forgetting": again}).digest

    assert with_text(TEXT, "copy.txt") == spec.digest
    others = [wanted.model_copy(update={"limit": 29}), wanted.model_copy(update={"harness": ("rte",)}), None]
    digests = {spec.model_copy(update={"forgetting": other}).digest for other in others}
    assert len({*digests, spec.digest, with_text(TEXT + "!", "other.txt")}) == 5


def test_a_number_without_an_earlier_one_stands_alone():
    before = [Measure(source="llmft", name="toy", metric="accuracy", value=0.5)]
    after = [before[0].model_copy(update={"value": 0.25}), Measure(source="harness", name="toy", metric="accuracy", value=0.75)]
    first, second = pair(before, after)
    assert (first.before.value, first.after.value, second.before) == (0.5, 0.25, None)
