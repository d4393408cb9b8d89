from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load
from support.small_models import CPU

from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.models.loading import borrow_model, load_tokenizer
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial


def prompts(spec) -> dict[str, list[str]]:
    """Set -> the whole texts of its prompts."""
    encoded, tokenizer = encode_prompts(spec, prepare_trial(spec)), load_tokenizer(spec.model)
    return {
        name: [tokenizer.decode([*encoded.prefix_of(name), *ids], skip_special_tokens=True) for ids in queries.suffixes]
        for name, queries in encoded.sets.items()
    }


def query(example) -> str:
    return f"{example.fields['premise']} {example.fields['hypothesis']} ?"


@pytest.mark.parametrize("train_on", ["others", "all"])
def test_training_prompts_are_bare_and_scored_ones_hold_the_first_shots(spec_of, train_on):
    spec = spec_of("finetuned_in_context", {"train_on": train_on}, n_shots=12)
    shots, texts = prepare_trial(spec).draw.shots, prompts(spec)
    assert texts["shots"] == [query(example) for example in (shots[4:] if train_on == "others" else shots)]
    for name in ("dev", "toy", "toy_hans"):
        for text in texts[name]:
            assert text.count("\n\n") == 4 and all(query(example) in text for example in shots[:4])
            assert not any(query(example) in text for example in shots[4:])
    assert sum(example.label for example in shots[:4]) == 2


def test_training_prompts_may_look_like_the_scored_ones(spec_of):
    spec = spec_of("finetuned_in_context", {"train_prompts": "with_demonstrations"}, n_shots=12)
    shots, texts = prepare_trial(spec).draw.shots, prompts(spec)
    assert len(texts["shots"]) == 8
    for text, example in zip(texts["shots"], shots[4:], strict=True):
        *shown, last = text.split("\n\n")
        assert last == query(example) and not any(query(example) in each for each in shown)


def test_the_answer_never_stands_in_the_prompt_it_is_trained_on(spec_of):
    with pytest.raises(UserError, match="would show the answer"):
        build_method("finetuned_in_context", {"train_on": "all", "train_prompts": "with_demonstrations"})


@pytest.mark.parametrize(("settings", "n_shots"), [({}, 4), ({"train_on": "all"}, 2), ({"n_demonstrations": 16}, 16)])
def test_too_few_shots_for_both_are_refused(spec_of, settings, n_shots):
    record = run_trial(spec_of("finetuned_in_context", settings, n_shots=n_shots), CPU).record
    assert record.cause == "user_error" and "needs at least" in record.message


def test_what_is_scored_is_the_trained_model_with_the_whole_prompt(spec_of):
    """Through the network's own forward, a prompt at a time, with the weights that the trial kept; the shared prefix is on."""
    spec = spec_of("finetuned_in_context", {"n_demonstrations": 8}, n_shots=16, n_test=6, selections=("last",))
    result = run_trial(spec, replace(CPU, keep_weights=True))
    encoded, setting = encode_prompts(spec, prepare_trial(spec)), prepare_trial(spec)
    assert encoded.shares_prefix and len(result.record.draws.demonstrations) == 8
    rows = [r for r in parquet.read_table(io.BytesIO(result.predictions)).to_pylist() if r["set"] == "toy"]
    ids = [word[0] for word in setting.words.ids]
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model, torch.no_grad():
        model.network.load_state_dict(load(result.weights), strict=False)
        for row, suffix in zip(rows, encoded.sets["toy"].suffixes, strict=True):
            logits = model.network(torch.tensor([[*encoded.prefix, *suffix]])).logits[0, -1]
            np.testing.assert_allclose(row["label_log_probabilities"], logits[ids].log_softmax(0), atol=1e-4)
