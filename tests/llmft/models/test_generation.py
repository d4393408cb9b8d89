from __future__ import annotations

import dataclasses
import io
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from support.plain_generation import plain_generate
from support.small_models import CPU, save_model
from support.training import with_shots
from transformers import GenerationConfig

from llmft.config.spec import GenerationSpec
from llmft.errors import TrialFailure, UserError
from llmft.evaluation import evaluator
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._registry import METHODS, build_method, method_class
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.generation import _Gumbel
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model
from llmft.runtime import Runtime
from llmft.tasks._registry import load_task
from llmft.trial.forgetting import measure, resolve_forgetting
from llmft.trial.preparation import PreparedTrial, encode_prompts, prepare_trial
from llmft.trial.run import check_spec, run_trial

SERVES = [name for name in METHODS if "generation" in method_class(name).kinds]
SMALL_PASSES = Runtime(device="cpu", micro_batch_tokens=1)  # every query alone


@pytest.fixture(scope="session")
def text_spec(spec_of):
    """A short trial on the toy task whose answers are texts."""

    def make(method: str = "zero_shot", settings: dict | None = None, generation: dict | None = None, **changed):
        spec = GenerationSpec(**{"max_new_tokens": 5} | (generation or {}))
        selections = ("last", "best_dev") if method_class(method).trains else ("none",)
        usual = {"task": "toy_text", "generation": spec, "n_shots": 0 if method == "zero_shot" else 6, "selections": selections}
        return spec_of(method, settings, **usual | {"n_test": 7, "n_dev": 3} | changed)

    return make


def generated(spec, runtime: Runtime = CPU):
    """What the trial's method generates for the in-domain set, without training, and its prompts as text."""
    setting = prepare_trial(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        evaluator = Evaluator(AdaptedModel(setting.method, model), encode_prompts(spec, setting), None, runtime, setting.decoding)
        return evaluator.predict("toy_text")


def with_references(setting: PreparedTrial, references: list[str]) -> PreparedTrial:
    """The same setting, whose first shots have other references."""
    shots = setting.draw.shots
    changed = [dataclasses.replace(shot, references=(text,)) for shot, text in zip(shots, references, strict=False)]
    return with_shots(setting, (*changed, *shots[len(changed) :]))


def prompts_by_hand(spec, order: list[str]) -> list[str]:
    """Demonstrations in this order (ids) with their first reference, then the query; written out without llmft's patterns."""
    setting = prepare_trial(spec)
    by_id = {example.id: example for example in setting.draw.shots}
    shown = "".join(f"{by_id[id].fields['sentence']} ? {by_id[id].references[0]}\n\n" for id in order)
    return [f"{shown}{example.fields['sentence']} ?" for example in setting.tests[0].examples]


ARCHITECTURES = [
    *[(name, {}) for name in ("opt", "gpt2", "llama", "gpt_neox", "bloom")],
    ("mistral", {"sliding_window": 12}),
]


@pytest.mark.parametrize(("architecture", "changed"), ARCHITECTURES)
def test_in_context_generation_is_plain_generate_on_prompts_written_by_hand(tmp_path, tokenizer, text_spec, architecture, changed):
    model = resolve_model(save_model(tmp_path / architecture, architecture, tokenizer, **changed))
    spec = text_spec("in_context", model=model, generation={"stop": ()})
    order = [example.id for example in encode_prompts(spec, prepare_trial(spec)).demonstrations]
    expected = plain_generate(spec, prompts_by_hand(spec, order))
    assert len(set(expected)) > 2
    together, alone = generated(spec), generated(spec, SMALL_PASSES)
    assert list(together.texts) == list(alone.texts) == expected


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {}])
def test_zero_shot_generation_is_plain_generate(text_spec, settings):
    spec = text_spec(generation={"stop": (), **settings})
    assert list(generated(spec).texts) == plain_generate(spec, prompts_by_hand(spec, []), **settings)


def test_beams_share_the_prefix_too(text_spec):
    spec = text_spec("in_context", generation={"stop": (), "num_beams": 2})
    order = [example.id for example in encode_prompts(spec, prepare_trial(spec)).demonstrations]
    assert list(generated(spec).texts) == plain_generate(spec, prompts_by_hand(spec, order), num_beams=2)


def test_what_a_model_was_published_with_changes_nothing(tmp_path, tokenizer, text_spec):
    folder = tmp_path / "opt"
    save_model(folder, "opt", tokenizer)
    before = generated(text_spec(model=resolve_model(str(folder)))).texts
    GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=[2, 3]).save_pretrained(folder)
    assert generated(text_spec(model=resolve_model(str(folder)))).texts == before


def test_drawn_texts_hang_on_the_seed_and_the_query_alone(text_spec):
    spec = text_spec(generation={"temperature": 1.5, "top_p": 0.9, "top_k": 40})
    texts = generated(spec).texts
    assert len(set(texts)) > 4
    assert generated(spec).texts == generated(spec, SMALL_PASSES).texts == texts
    assert generated(spec.model_copy(update={"dropout_seed": 1})).texts != texts
    assert generated(text_spec()).texts != texts


def test_gumbel_noise_draws_by_probability():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 4000
    rows = _Gumbel(0, torch.arange(n))(None, probabilities.log().expand(n, -1)).argmax(1)
    shares = torch.bincount(rows, minlength=4) / n
    torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)  # four deviations of the largest


def test_an_output_ends_before_a_stop_text(text_spec):
    whole = generated(text_spec(generation={"stop": ()}))
    at = max(range(7), key=lambda i: len(whole.texts[i]))
    stop = whole.texts[at][2:4]
    stopped = generated(text_spec(generation={"stop": (stop,)}))
    for before, after, finished in zip(whole.texts, stopped.texts, stopped.finished, strict=True):
        assert after == before.split(stop)[0].strip() and (finished or stop not in before)
    assert stopped.texts[at] == whole.texts[at][:2].strip() and stopped.finished[at]


def test_the_separator_ends_an_output_unless_the_plan_says_otherwise(text_spec):
    assert prepare_trial(text_spec()).decoding.stop == ("\n\n",)
    assert prepare_trial(text_spec(separator=" ; ")).decoding.stop == (" ; ",)
    assert prepare_trial(text_spec(generation={"stop": (".",)})).decoding.stop == (".",)


@pytest.mark.parametrize("name", ["pattern", "lora"])
def test_the_loss_is_the_mean_over_tokens_then_examples_by_hand(text_spec, name):
    spec = text_spec(name)
    setting = with_references(prepare_trial(spec), [f"Soon{' Later' * n}" for n in range(6)])
    encoded = encode_prompts(spec, setting)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model, torch.no_grad():
        build_method(name, spec.settings).prepare(model, 0, torch.Generator().manual_seed(0))
        batch = make_batch(encoded.sets["shots"], range(6), None, model, prefix_ids=encoded.prefix)
        loss = AdaptedModel(setting.method, model)(setting.method.loss, batch)
        losses = []
        for example in setting.draw.shots:
            tokenizer = setting.decoding.tokenizer
            prompt = tokenizer(f"{example.fields['sentence']} ?")["input_ids"]
            whole = tokenizer(f"{example.fields['sentence']} ? {example.references[0]}")["input_ids"] + [tokenizer.eos_token_id]
            log_probabilities = model.network(torch.tensor([whole])).logits[0].log_softmax(-1)
            answer = range(len(prompt), len(whole))
            losses.append(-np.mean([float(log_probabilities[at - 1, whole[at]]) for at in answer]))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_small_passes_change_no_step_of_the_training(text_spec):
    spec = text_spec("pattern", epochs=3, batch_size=4)
    whole, cut = (run_trial(spec, runtime).record for runtime in (CPU, dataclasses.replace(CPU, micro_batch_tokens=40)))
    losses = [[point.train_loss for point in record.curve] for record in (whole, cut)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] > losses[0][-1]


@pytest.mark.parametrize("name", SERVES)
def test_every_method_that_serves_it_gives_texts_and_their_scores(text_spec, name):
    results = [run_trial(text_spec(name, epochs=1), CPU) for _ in range(2)]
    record = results[0].record
    assert record.finished, record.message
    assert results[0].predictions == results[1].predictions
    numbers = record.metrics["best_dev" if method_class(name).trains else "none"]["toy_text"]
    assert numbers.metric == "rougeL" and numbers.score == numbers.rougeL and np.isnan(numbers.accuracy)
    assert 0 <= numbers.bleu <= 1 and numbers.bleu_signature.startswith("nrefs:1|")
    rows = parquet.read_table(io.BytesIO(results[0].predictions)).to_pylist()
    mine = [row for row in rows if row["set"] == "toy_text" and row["selection"] in ("none", "best_dev")]
    assert [row["id"] for row in mine] == [example.id for example in prepare_trial(text_spec(name)).tests[0].examples]
    assert np.mean([row["rougeL"] for row in mine]) == pytest.approx(numbers.score)


def test_a_classification_head_cannot_generate(text_spec):
    with pytest.raises(UserError, match="'vanilla' is for classification, and the task 'toy_text' for generation. Methods for gen"):
        check_spec(text_spec("vanilla"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"generation": None}, "give a GenerationSpec"), ({"task": "toy"}, "leave generation out"),
     ({"n_shots": 4, "shots_unit": "per_class"}, "per_class is for tasks with labels"), ({"verbalizer": "yes-no"}, "'yes-no'")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(text_spec, changed, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_spec(text_spec("in_context").model_copy(update=changed))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"temperature": 0.7, "num_beams": 2}, "num_beams"), ({"top_p": 0.9}, "temperature"), ({"stop": ("",)}, "empty")],
)
def test_settings_of_the_generation_that_contradict_each_other_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        GenerationSpec(**values)


def test_demonstrations_leave_room_for_what_is_generated(text_spec):
    spec = text_spec("in_context", n_shots=40, max_length=128, generation={"max_new_tokens": 30})
    encoded = encode_prompts(spec, prepare_trial(spec))
    longest = len(encoded.prefix) + max(len(ids) for queries in encoded.sets.values() for ids in queries.suffixes)
    assert encoded.n_dropped > 0 and longest + 30 <= 128 + 1
    roomier = encode_prompts(text_spec("in_context", n_shots=40, max_length=128), prepare_trial(spec))
    assert roomier.n_dropped < encoded.n_dropped


def test_a_query_that_leaves_no_room_fails_with_its_cause(text_spec):
    record = run_trial(text_spec(max_length=20, generation={"max_new_tokens": 18}), CPU).record
    assert record.cause == "query_too_long" and "18 new tokens" in record.message
    spec = text_spec("pattern", max_length=60)
    encode_prompts(spec, prepare_trial(spec))
    with pytest.raises(TrialFailure, match="toy_text_train/[0-9]+ and its answer take .* at most 60") as raised:
        encode_prompts(spec, with_references(prepare_trial(spec), ["Soon " * 60]))
    assert raised.value.cause == "query_too_long"


def test_smaller_passes_are_tried_when_memory_runs_out(text_spec, monkeypatch):
    sizes, usual = [], evaluator.generate

    def hungry(model, batch, decoding):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return usual(model, batch, decoding)

    expected = run_trial(text_spec(), CPU)
    monkeypatch.setattr(evaluator, "generate", hungry)
    result = run_trial(text_spec(), CPU)
    assert result.record.finished and result.record.cost.n_out_of_memory > 0 and max(sizes) > 2
    assert result.predictions == expected.predictions


def test_a_trained_toy_says_the_first_word_twice_and_stops(text_spec):
    spec = text_spec(
        "pattern", model=resolve_model("toy"), n_shots=64, epochs=30, batch_size=16, learning_rate=1e-3, eval_every_epochs=100,
        n_test=48, selections=("last",),
    )  # fmt: skip
    record = run_trial(spec, CPU).record
    numbers = record.metrics["last"]
    assert numbers["toy_text"].exact_match > 0.65  # a constant answer gets a quarter
    assert numbers["toy_text_hans"].exact_match > 0.35  # half of its first words are new
    assert numbers["toy_text"].cut_share == 0
    untrained = run_trial(text_spec(model=resolve_model("toy"), n_test=48), CPU).record
    assert untrained.metrics["none"]["toy_text"].exact_match == 0


def test_what_a_model_forgets_of_a_task_of_texts_is_measured(text_spec):
    spec = text_spec()
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        wanted = resolve_forgetting(tasks=["toy_text"], limit=6)
        (measured,) = measure(AdaptedModel(build_method("zero_shot", {}), model), spec.model, wanted, CPU)
    asked = spec.model_copy(update={"n_dev": 0, "n_test": 6, "n_shots": 0, "generation": load_task("toy_text").generation})
    numbers = run_trial(asked, CPU).record.metrics["none"]["toy_text"]
    assert (measured.metric, measured.value, measured.stderr, measured.n) == ("rougeL", numbers.rougeL, None, 6)


@pytest.mark.parametrize(
    ("name", "settings", "train", "said"),
    [("prompt_tuning", {"initialisation": "labels"}, {}, "initialisation: 'labels' are label words"),
     ("prefix_tuning", {}, {"gradient_checkpointing": True}, "'prefix_tuning' cannot have it")],
)  # fmt: skip
def test_what_a_method_cannot_have_is_refused_for_texts_too(text_spec, name, settings, train, said):
    with pytest.raises(UserError, match=said):
        check_spec(text_spec(name, settings, **train))


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_behind_virtual_tokens_every_query_gets_what_it_would_get_alone(text_spec, name):
    spec = text_spec(name, {"n_virtual_tokens": 3}, epochs=1, selections=("last",))
    together, alone = (run_trial(spec, runtime) for runtime in (CPU, SMALL_PASSES))
    texts = [parquet.read_table(io.BytesIO(result.predictions))["text"].to_pylist() for result in (together, alone)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
