"""A base in 4 bits, on the CPU, where bitsandbytes computes what it computes on a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from peft import PeftModel
from support.small_models import CPU
from transformers import AutoModelForCausalLM

from llmft.errors import Cause, TrialFailure, UserError
from llmft.methods._registry import build_method
from llmft.models.loading import borrow_model, n_parameters
from llmft.trial.export import export_adapter, export_model
from llmft.trial.run import check_spec, run_trial

NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip
"""The paper's appendix E, rounded."""
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs llmft[qlora]")


def borrowed(spec, kind: str = "nf4"):
    return borrow_model(spec.model, "fp32", torch.device("cpu"), base_weights=kind)


@bitsandbytes
def test_the_base_holds_the_nearest_of_sixteen_values(spec_of):
    from bitsandbytes.functional import dequantize_4bit

    with borrowed(spec_of("qlora")) as quantised, borrowed(spec_of("qlora"), "fp32") as full:
        for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"):
            path = f"model.decoder.layers.1.{name}"
            held, weight = quantised.network.get_submodule(path).weight, full.network.get_submodule(path).weight
            blocks = weight.reshape(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            nearest = (blocks[..., None] / largest[..., None] - torch.tensor(NF4)).abs().argmin(-1)
            expected = (torch.tensor(NF4)[nearest] * largest).reshape(weight.shape)
            assert held.dtype is torch.uint8 and held.numel() == weight.numel() // 2
            got = dequantize_4bit(held.data, held.quant_state).float()
            # the blocks' scales are kept in 8 bits themselves, so that they are off by a little
            torch.testing.assert_close(got, expected, atol=0.02 * weight.abs().max().item(), rtol=0.02)
        names = {name for name, module in quantised.network.named_modules() if type(module).__name__ == "Linear4bit"}
        linear = {name for name, module in full.network.named_modules() if isinstance(module, torch.nn.Linear)}
        assert names == linear - {"lm_head"} and len(names) == 2 * 6
        assert n_parameters(quantised.network) == n_parameters(full.network)


@bitsandbytes
def test_the_adapter_stands_on_every_layer_and_in_fp32(spec_of):
    with borrowed(spec_of("qlora")) as model:
        build_method("qlora", {}).prepare(model, 2, torch.Generator().manual_seed(0))
        trained = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 6 * 2 and all(parameter.dtype is torch.float32 for parameter in trained.values())
        layer = model.network.model.decoder.layers[0].fc1
        assert (layer.r["default"], layer.scaling["default"]) == (64, 16 / 64)
        norms = [module for module in model.network.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert norms and all(norm.weight.dtype is torch.float32 for norm in norms)


@bitsandbytes
def test_scoring_does_not_repack_what_lies_in_memory(spec_of):
    """bitsandbytes would, on some CPUs, and no GPU could read it then."""
    with borrowed(spec_of("qlora")) as model, torch.no_grad():
        before = [parameter.clone() for parameter in model.network.parameters() if parameter.dtype is torch.uint8]
        model.network(torch.tensor([[5, 6, 7]]))
        after = [parameter for parameter in model.network.parameters() if parameter.dtype is torch.uint8]
        assert before and all(map(torch.equal, before, after))
        for module in model.network.modules():  # what the library would do by itself is turned off where it is asked
            assert not getattr(module, "support_avx512bf16_for_cpu", False)


@bitsandbytes
def test_the_adapter_is_exported_by_itself(tmp_path, spec_of):
    spec = spec_of("qlora", {"r": 2}, learning_rate=0.05)
    weights = run_trial(spec, dataclasses.replace(CPU, keep_weights=True)).weights
    export_adapter(spec, weights, tmp_path / "adapter")
    base, ids = AutoModelForCausalLM.from_pretrained(spec.model.path).eval(), torch.tensor([[2, 30, 90, 200, 7]])
    with torch.no_grad(), borrowed(spec, "fp32") as model:
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        assert (adapted - before).abs().max() > 0.01 and len(model.network.model.decoder.layers) == 2
    with pytest.raises(UserError, match="base in 4 bits; merged .* another model"):
        export_model(spec, weights, tmp_path / "model")


def test_without_the_library_it_is_refused_before_anything_is_loaded(monkeypatch, spec_of):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest))
    monkeypatch.setattr("llmft.trial.run.borrow_model", lambda *args, **kwargs: pytest.fail("loaded"))
    spec = spec_of("qlora")
    with pytest.raises(UserError, match=r"method 'qlora' needs bitsandbytes.*pip install 'llmft\[qlora\]'"):
        check_spec(spec)
    check_spec(spec, here=False)  # the machine that asks need not be the one that runs it
    record = run_trial(spec, CPU).record
    assert record.cause is Cause.USER_ERROR and "needs bitsandbytes" in record.message


@bitsandbytes
def test_a_width_that_is_no_multiple_of_a_block_is_refused(spec_of, small_opt):
    """Of which bitsandbytes makes other numbers on a CPU."""
    record = run_trial(spec_of("qlora", model=small_opt), CPU).record
    assert record.cause is Cause.USER_ERROR and "reads 32 numbers" in record.message


@bitsandbytes
def test_several_processes_are_refused(spec_of):
    with pytest.raises(TrialFailure, match="Use one GPU a trial"):
        run_trial(spec_of("qlora"), dataclasses.replace(CPU, world_size=2))
