"""Encoder-decoder models that generate texts and are trained on them, against plain transformers, one example at a time."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from support.small_models import CPU, ENCODER_DECODERS
from support.training import with_shots
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from llmft.config.spec import GenerationSpec
from llmft.errors import TrialFailure, UserError
from llmft.methods._registry import METHODS, method_class
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.loading import borrow_model
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import check_spec, run_trial

each_family = pytest.mark.parametrize("family", ENCODER_DECODERS)
SMALL_PASSES = dataclasses.replace(CPU, micro_batch_tokens=1)
SERVES = [name for name in METHODS if "generation" in method_class(name).kinds and name not in ("qlora", "prefix_tuning")]


@pytest.fixture
def spec(refs, family, spec_of):
    def make(method="zero_shot", settings=None, generation=None, **changed):
        usual = {
            "model": refs[family], "task": "toy_text", "separator": " ## ", "n_shots": 0 if method == "zero_shot" else 4,
            "generation": GenerationSpec(**{"max_new_tokens": 5, "stop": ()} | (generation or {})), "n_test": 6, "n_dev": 2,
            "selections": ("last", "best_dev") if method_class(method).trains else ("none",),
        }  # fmt: skip
        return spec_of(method, settings, **usual | changed)

    return make


def texts_of(spec, runtime=CPU) -> list[str]:
    result = run_trial(spec, runtime)
    assert result.record.finished, result.record.message
    rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    return [row["text"] for row in rows if row["set"] == "toy_text" and row["selection"] == rows[0]["selection"]]


def plain_generate(spec, order: list[str], **settings) -> list[str]:
    """transformers' own `generate` on prompts written by hand; BART's texts open with `<s>`, as its published settings force."""
    setting, path = prepare_trial(spec), spec.model.path
    network, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    network.generation_config = GenerationConfig()  # BartConfig would force the end of the text on the last token
    by_id, texts = {example.id: example for example in setting.draw.shots}, []
    shown = "".join(f"{by_id[id].fields['sentence']} ? {by_id[id].references[0]} ## " for id in order)
    forced = {"forced_bos_token_id": 0} if network.config.model_type == "bart" else {}
    config = GenerationConfig(
        max_new_tokens=spec.generation.max_new_tokens + len(forced), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=network.config.decoder_start_token_id, **forced, **settings,
    )  # fmt: skip
    for example in setting.tests[0].examples:
        inputs = tokenizer(f"{shown}{example.fields['sentence']} ?", return_tensors="pt", return_token_type_ids=False)
        texts.append(tokenizer.decode(network.generate(**inputs, generation_config=config)[0], skip_special_tokens=True).strip())
    return texts


@each_family
@pytest.mark.parametrize(("method", "settings"), [("zero_shot", {}), ("in_context", {}), ("zero_shot", {"num_beams": 3})])
def test_generation_is_plain_generate_on_prompts_written_by_hand(spec, method, settings):
    given = spec(method, generation=settings)
    order = [example.id for example in encode_prompts(given, prepare_trial(given)).demonstrations]
    assert len(order) == (4 if method == "in_context" else 0)
    expected = plain_generate(given, order, **settings)
    assert len(set(expected)) > 2
    assert texts_of(given) == texts_of(given, SMALL_PASSES) == expected


@pytest.mark.parametrize("family", ["bart"])
def test_drawn_texts_hang_on_the_seed_and_the_query_alone(spec):
    given = spec(generation={"temperature": 1.5})
    texts = texts_of(given)
    assert texts_of(given, SMALL_PASSES) == texts != texts_of(given.model_copy(update={"dropout_seed": 1}))


@pytest.mark.parametrize("family", ["flan"])
def test_an_output_ends_before_a_stop_text(spec):
    whole = texts_of(spec())
    stop = max(whole, key=len)[2:4]
    assert texts_of(spec(generation={"stop": (stop,)})) == [text.split(stop)[0].strip() for text in whole]


@each_family
def test_the_loss_is_that_of_transformers_with_labels(spec, family):
    """The mean over an example's tokens; BART's loss would also count `<s>`, which its generation never chooses."""
    given = spec("pattern", n_shots=6)
    setting = prepare_trial(given)
    shots = [dataclasses.replace(shot, references=(f"Soon{' doctors' * n}",)) for n, shot in enumerate(setting.draw.shots)]
    setting = with_shots(setting, tuple(shots))
    encoded = encode_prompts(given, setting)
    with borrow_model(given.model, "fp32", torch.device("cpu")) as model, torch.no_grad():
        adapted = AdaptedModel(setting.method, model)
        batches = [make_batch(encoded.sets["shots"], rows, None, model) for rows in [range(6), *([i] for i in range(6))]]
        together, *alone = (float(adapted(adapted.method.loss, batch)) for batch in batches)
    network, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(given.model.path).eval(), AutoTokenizer.from_pretrained(given.model.path)
    expected = []
    for shot in shots:
        labels = tokenizer(text_target=shot.references[0], return_tensors="pt")["input_ids"]
        if family == "bart":
            assert labels[0, 0] == 0
        inputs = tokenizer(f"{shot.fields['sentence']} ?", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = network(**inputs, labels=labels)
        if family == "bart":
            kept = output.logits[0, 1:].log_softmax(-1)[torch.arange(labels.shape[1] - 1), labels[0, 1:]]
            expected.append(float(-kept.mean()))
        else:
            expected.append(float(output.loss))
    assert alone == pytest.approx(expected, rel=1e-4) and together == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["bart"])
def test_small_passes_change_no_step_of_the_training(spec):
    given = spec("pattern", epochs=3, batch_size=3, epsilon=1e-4)
    whole, cut = (run_trial(given, runtime).record for runtime in (CPU, dataclasses.replace(CPU, micro_batch_tokens=30)))
    losses = [[point.train_loss for point in record.curve] for record in (whole, cut)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > losses[0][-1]


@pytest.mark.parametrize(("name", "family"), [(name, "bart" if name == "bitfit" else "flan") for name in SERVES])  # T5 has no biases
def test_every_method_that_serves_it_gives_texts(spec, name):
    record = run_trial(spec(name, n_shots=6, epochs=1), CPU).record
    assert record.finished, record.message
    assert 0 <= record.metrics["best_dev" if method_class(name).trains else "none"]["toy_text"].rougeL <= 1


@pytest.mark.parametrize("family", ["flan", "bart"])
def test_it_learns_to_say_the_shots_and_to_stop(spec):
    given = spec("pattern", n_shots=8, epochs=140, learning_rate=3e-3, eval_every_epochs=140, generation={"max_new_tokens": 8})
    setting = prepare_trial(given)
    encoded = encode_prompts(given, setting)
    assert all(ids[-1] == setting.decoding.tokenizer.eos_token_id for ids in encoded.sets["shots"].completions)
    record = run_trial(given, CPU).record
    assert record.curve[-1].train_loss < 0.6  # nats a token; a guess among all words has 6
    assert record.metrics["last"]["toy_text"].cut_share < 0.5


@pytest.mark.parametrize("family", ["flan"])
def test_a_soft_prompt_opens_what_the_encoder_reads_for_every_query(spec):
    given = spec("prompt_tuning", {"n_virtual_tokens": 3}, epochs=1, selections=("last",))
    together = texts_of(given)
    assert together == texts_of(given, SMALL_PASSES) and len(set(together)) > 2


@pytest.mark.parametrize("family", ["bart"])
def test_what_the_decoder_cannot_hold_is_refused(spec):
    with pytest.raises(UserError, match="generation.max_new_tokens: at most 511 fit"):
        check_spec(spec(generation={"max_new_tokens": 512}))
    check_spec(spec(generation={"max_new_tokens": 511}))
    given = spec("pattern")
    setting = prepare_trial(given)
    shots = tuple(dataclasses.replace(shot, references=(" Soon" * 600,)) for shot in setting.draw.shots)
    with pytest.raises(TrialFailure, match="the answer of toy_text_train/[0-9]+ takes [0-9]+ tokens; at most 510") as raised:
        encode_prompts(given, with_shots(setting, shots))
    assert raised.value.cause == "query_too_long"
