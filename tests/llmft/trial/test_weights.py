from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from support.small_models import CPU

from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._registry import METHODS, build_method, method_class
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import borrow_model
from llmft.records.record_files import WEIGHTS_FILE, read_record, write_record
from llmft.seeds import derive
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial
from llmft.trial.weights import put_weights, restored

KEEPING = dataclasses.replace(CPU, keep_weights=True)
EARLY = {"epochs": 8, "learning_rate": 1e-2, "n_dev": 10, "n_test": 24}  # dev accuracy goes up and down


def prepared(spec, model, seed: int | None = None):
    method = build_method(spec.method, spec.settings)
    method.prepare(model, 2, torch.Generator().manual_seed(derive(spec.init_seed if seed is None else seed, "init")))
    return method


@pytest.mark.parametrize(
    ("name", "selections"),
    [(name, ("last", "best_dev")) for name in METHODS if method_class(name).trains and "classification" in method_class(name).kinds]
    + [(name, chosen) for name in ("pattern", "lora") for chosen in (("last",), ("best_dev", "best_in_domain"))],
)
def test_kept_weights_predict_what_the_trial_did(tmp_path, spec_of, name, selections):
    spec = spec_of(name, selections=selections, **EARLY)
    result = run_trial(spec, KEEPING)
    write_record(tmp_path, result.record, result.predictions, result.weights)
    record, rows = read_record(tmp_path), parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert record.weights_sha256 == hashlib.sha256((tmp_path / WEIGHTS_FILE).read_bytes()).hexdigest()
    setting = prepare_trial(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu"), base_weights=method_class(name).base_weights) as model:
        adapted = AdaptedModel(prepared(spec, model, seed=77), model)  # what is drawn at the start does not matter any more
        adapted.method.finalize(adapted)
        put_weights(model, (tmp_path / WEIGHTS_FILE).read_bytes(), "test")
        evaluator = Evaluator(adapted, encode_prompts(spec, setting), setting.words, CPU, reasoning=setting.reasoning)
        chosen = "best_dev" if "best_dev" in selections else "last"
        for test in setting.tests:
            expected = [row["label_log_probabilities"] for row in rows if (row["selection"], row["set"]) == (chosen, test.name)]
            np.testing.assert_array_equal(evaluator.predict(test.name).log_probabilities, np.array(expected, dtype=np.float32))
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS_FILE).values())
    assert 4 * stored == record.cost.stored_bytes and stored <= record.cost.n_trainable_parameters


def test_the_best_on_dev_is_kept_also_where_it_had_predicted_already(spec_of):
    spec = spec_of("pattern", selections=("last", "best_dev", "best_in_domain"), **EARLY).with_seed(1)
    with_oracle = run_trial(spec, KEEPING)
    assert with_oracle.record.selected_step["best_dev"] < with_oracle.record.selected_step["last"]
    without = run_trial(spec.model_copy(update={"selections": ("last", "best_dev")}), KEEPING)
    assert with_oracle.weights == without.weights


def test_nothing_is_kept_unasked_or_where_nothing_is_trained(spec_of, tmp_path):
    assert run_trial(spec_of("lora"), CPU).weights is None
    for name in ("zero_shot", "in_context"):
        result = run_trial(spec_of(name), KEEPING)
        assert result.record.finished and result.weights is None
        write_record(tmp_path / name, result.record, result.predictions, result.weights)
        assert not (tmp_path / name / WEIGHTS_FILE).exists()


def test_weights_of_another_shape_or_place_are_refused(tmp_path, spec_of):
    spec = spec_of("lora", {"r": 2})
    (tmp_path / WEIGHTS_FILE).write_bytes(run_trial(spec, KEEPING).weights)
    (tmp_path / "torn").write_bytes(b"{}")
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        prepared(spec.model_copy(update={"settings": {"r": 4}}), model)
        with pytest.raises(UserError, match="differ in 8 parameters"):
            put_weights(model, (tmp_path / WEIGHTS_FILE).read_bytes(), "test")
    for name in ("none", "torn"):
        with pytest.raises(UserError, match="cannot read|no weights"), restored(spec, tmp_path / name, torch.device("cpu")):
            pass
