"""Contextual calibration (Zhao et al. 2021) against a computation by hand with transformers."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from support.small_models import CPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.evaluation.predictions import Predictions
from llmft.models.info import TOY, resolve_model
from llmft.tasks._registry import load_task
from llmft.trial.run import run_trial

CALIBRATED = {"calibration": "contextual"}


def answers(spec):
    result = run_trial(spec, CPU)
    assert result.record.finished, result.record.message
    rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    return result.record, {(row["set"], row["id"]): np.array(row["label_log_probabilities"]) for row in rows}


@pytest.mark.parametrize("method", ["zero_shot", "in_context"])
@torch.no_grad()
def test_it_is_the_papers_formula(spec_of, small_opt, method):
    spec = spec_of(method, CALIBRATED, n_shots=4, n_test=6, n_dev=0, selections=("last",))
    record, calibrated = answers(spec)
    _, plain = answers(spec.model_copy(update={"settings": {"calibration": "none"}}))
    pool = {example.id: example for example in load_task("toy").load(spec.data).pool}
    shown = [pool[name] for name in record.draws.demonstrations]
    assert len(shown) == (4 if method == "in_context" else 0)
    opening = "".join(f"{e.fields['premise']} {e.fields['hypothesis']} ? {('Yes', 'No')[e.label]}\n\n" for e in shown)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_opt.path).eval(), AutoTokenizer.from_pretrained(small_opt.path)
    yes_no = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" Yes", " No")]
    shares = []
    for text in ("N/A", "", "[MASK]"):
        logits = model(**tokenizer(f"{opening}{text} {text} ?", return_tensors="pt")).logits[0, -1]
        shares.append(logits[yes_no].softmax(0).numpy())
    content_free = np.mean(shares, 0)
    assert list(record.content_free.values()) == pytest.approx(content_free.tolist(), abs=1e-5)
    assert plain.keys() == calibrated.keys() and len(plain) == 12
    for key, log_probabilities in plain.items():
        scaled = np.exp(log_probabilities) / content_free
        np.testing.assert_allclose(np.exp(calibrated[key]), scaled / scaled.sum(), atol=1e-5)
    assert any(abs(plain[key] - calibrated[key]).max() > 0.01 for key in plain)


def test_the_order_of_two_queries_stays_and_the_boundary_moves():
    log_probabilities = np.log(np.array([[0.95, 0.05], [0.91, 0.09], [0.99, 0.01]]))
    calibrated = Predictions(np.array([0, 1, 0]), log_probabilities, None).calibrated(np.array([0.94, 0.06]))
    assert calibrated.predicted.tolist() == [0, 1, 0] and calibrated.score == 1
    np.testing.assert_allclose(np.exp(calibrated.log_probabilities).sum(1), 1)
    ratio = calibrated.log_probabilities[:, 0] - calibrated.log_probabilities[:, 1]
    assert np.argsort(ratio).tolist() == [1, 0, 2]


def test_a_constant_predictor_is_cured_and_its_bias_told(spec_of, tmp_path):
    """The toy model, to which one label word is made far more probable than the other, whatever it reads."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TOY), AutoTokenizer.from_pretrained(TOY)
    yes, no = (model.get_input_embeddings().weight[tokenizer(w, add_special_tokens=False)["input_ids"][0]] for w in (" Yes", " No"))
    with torch.no_grad():
        model.model.decoder.final_layer_norm.bias += 12 * (yes - no) / (yes - no).square().sum()  # 12 nats
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    biased = {"model": resolve_model(str(tmp_path)), "n_dev": 0, "n_test": 100, "selections": ("last",)}
    plain, calibrated = (run_trial(spec_of("in_context", {"calibration": c}, **biased), CPU).record for c in ("none", "contextual"))
    assert "constant_prediction" in {finding.code for finding in plain.findings if finding.set == "toy"}
    (finding,) = (finding for finding in calibrated.findings if finding.code == "label_bias")
    assert finding.value == calibrated.content_free["entailment"] > 0.99 and "entailment" in finding.message
    assert plain.metrics["none"]["toy"].accuracy == 0.5
    assert calibrated.metrics["none"]["toy"].accuracy > 0.7


def test_nothing_is_recorded_where_nothing_is_calibrated(spec_of):
    record = run_trial(spec_of("in_context"), CPU).record
    assert record.content_free == {} and not [f for f in record.findings if f.code == "label_bias"]
