from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from small_models import CPU, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.errors import UserError
from llmft.export import export_adapter, export_model
from llmft.model import borrow_model, resolve_model
from llmft.registry import build_method, complete_settings
from llmft.trial import run_trial
from llmft.weights import put_weights

KEEPING = dataclasses.replace(CPU, keep_weights=True)
IDS = torch.tensor([[2, 30, 90, 200, 7], [2, 8, 17, 6, 5]])


def trained(spec) -> bytes:
    result = run_trial(spec, KEEPING)
    assert result.record.finished, result.record.message
    return result.weights


@torch.no_grad()
def own_logits(spec, weights: bytes) -> torch.Tensor:
    """Of the trial's own model, without any file in between."""
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        build_method(spec.method, spec.settings).prepare(model, 2, torch.Generator().manual_seed(5))
        put_weights(model, weights, "test")
        return model.network.eval()(IDS).logits


def base_of(spec):
    return AutoModelForCausalLM.from_pretrained(spec.model.path).eval()


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory, tokenizer):
    return resolve_model(save_model(tmp_path_factory.mktemp("export") / "gpt2", "gpt2", tokenizer))


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
@pytest.mark.parametrize(
    ("name", "settings"), [("lora", {"r": 2}), ("lora", {"targets": "all-linear", "dora": True, "rslora": True}), ("ia3", {})]
)
def test_peft_and_transformers_load_what_was_trained(tmp_path, spec_of, small_gpt2, architecture, name, settings):
    model = {"model": small_gpt2} if architecture == "gpt2" else {}
    spec = spec_of(name, settings, learning_rate=0.05, **model)
    weights = trained(spec)
    expected = own_logits(spec, weights)
    export_adapter(spec, weights, tmp_path / "adapter")
    export_model(spec, weights, tmp_path / "merged")
    with torch.no_grad():
        before = base_of(spec)(IDS).logits
        adapted = PeftModel.from_pretrained(base_of(spec), tmp_path / "adapter").eval()(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("Yes").input_ids
        == AutoTokenizer.from_pretrained(spec.model.path)("Yes").input_ids
    )


def test_adapters_of_one_base_are_switched(tmp_path, spec_of):
    """One for each of two trials, of different size, in one model of peft's; and none."""
    specs = {
        "first": spec_of("lora", {"r": 2}, learning_rate=0.05),
        "second": spec_of("lora", {"r": 4}, learning_rate=0.05, data_seed=1),
    }
    expected = {}
    for name, spec in specs.items():
        weights = trained(spec)
        export_adapter(spec, weights, tmp_path / name)
        expected[name] = own_logits(spec, weights)
    model = PeftModel.from_pretrained(base_of(specs["first"]), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    with torch.no_grad():
        for name in ("second", "first", "second"):
            model.set_adapter(name)
            torch.testing.assert_close(model(IDS).logits, expected[name], atol=1e-6, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, base_of(specs["first"])(IDS).logits, atol=1e-6, rtol=0)
    assert (expected["first"] - expected["second"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["pattern", "bitfit", "last_layers"])
def test_a_method_that_adds_nothing_becomes_a_whole_model(tmp_path, spec_of, name):
    spec = spec_of(name, complete_settings(name, {}), learning_rate=0.01)
    weights = trained(spec)
    export_model(spec, weights, tmp_path / "model")
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(IDS).logits
        before = base_of(spec)(IDS).logits
    assert torch.equal(written, own_logits(spec, weights)) and (written - before).abs().max() > 0.001
    with pytest.raises(UserError, match=f"'{name}' has no form in peft. --merge"):
        export_adapter(spec, weights, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["vanilla", "head_only", "adapter_pfeiffer"])
def test_a_method_whose_parts_nobody_else_knows_is_refused(tmp_path, spec_of, name):
    spec = spec_of(name)
    with pytest.raises(UserError, match=f"'{name}' adds parts that no model of transformers has .*load_weights"):
        export_model(spec, trained(spec), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_exported_is_said(tmp_path, spec_of, tokenizer):
    spec = spec_of("lora", {"r": 2})
    weights = trained(spec)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_adapter(spec, weights, tmp_path / "full")
    with pytest.raises(UserError, match="kept weights and the prepared model differ"):
        export_adapter(spec_of("lora", {"targets": ["fc1"]}), weights, tmp_path / "new")
    model = save_model(tmp_path / "base", "opt", tokenizer)
    moved = spec.model_copy(update={"model": resolve_model(model).model_copy(update={"fingerprint": "0" * 16})})
    with pytest.raises(UserError, match="it has changed since"):
        export_adapter(moved, weights, tmp_path / "new")
