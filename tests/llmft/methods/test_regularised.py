"""The penalties of regularised fine-tuning against computations by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.small_models import CPU
from transformers import AutoModelForCausalLM

from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.loading import borrow_model
from llmft.prompting.encoding import SHOTS
from llmft.trial.distillation import run_teacher
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import run_trial


def test_kl_to_base_by_hand(spec_of):
    spec = spec_of("regularised", {"penalty": "kl_to_base", "strength": 0.7, "loss": "restricted"}, n_shots=6)
    setting = prepare_trial(spec)
    teaching = replace(CPU, micro_batch_tokens=50)  # several batches
    run_teacher(spec, setting, encode_prompts(spec, setting), encode_teacher_prompts(spec, setting), teaching)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        method = setting.method
        method.prepare(model, 2, torch.Generator().manual_seed(0))
        encoded = encode_prompts(spec, setting)
        adapted = AdaptedModel(method, model)
        batch = make_batch(encoded.sets[SHOTS], [4, 1, 5], setting.words, model, prefix_ids=encoded.prefix)
        pattern = build_method("pattern", {"loss": "restricted"})
        torch.testing.assert_close(adapted(adapted.method.loss, batch), pattern.loss(model, batch), atol=1e-5, rtol=0)  # nothing has moved
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        base, divergences = AutoModelForCausalLM.from_pretrained(spec.model.path).eval(), []
        with torch.no_grad():
            for i in (4, 1, 5):
                ids = torch.tensor([[*encoded.prefix, *encoded.sets[SHOTS].suffixes[i]]])
                p, q = (net(ids).logits[0, -1].log_softmax(-1) for net in (base, model.network))
                divergences.append(float((p.exp() * (p - q)).sum()))
        penalty = float((adapted(adapted.method.loss, batch) - pattern.loss(model, batch)).detach())
    assert penalty == pytest.approx(0.7 * sum(divergences) / 3, rel=1e-3) and penalty > 0.01


@pytest.mark.parametrize("penalty", ["l2_sp", "kl_to_base"])
def test_a_strength_of_zero_is_pattern_based_fine_tuning(spec_of, penalty):
    ours, plain = (
        run_trial(spec_of(name, settings), CPU).record
        for name, settings in (("regularised", {"penalty": penalty, "strength": 0.0}), ("pattern", {}))
    )
    assert [p.train_loss for p in ours.curve] == pytest.approx([p.train_loss for p in plain.curve], abs=1e-5)
    assert ours.weight_distance["last"] == pytest.approx(plain.weight_distance["last"], rel=1e-3)


@pytest.mark.parametrize(("penalty", "strength"), [("l2_sp", 100.0), ("ewc", 100.0), ("kl_to_base", 10.0)])
def test_a_strong_penalty_keeps_the_model_near(spec_of, penalty, strength):
    near, far = (run_trial(spec_of("regularised", {"penalty": penalty, "strength": s}, epochs=6), CPU).record for s in (strength, 0.0))
    assert near.weight_distance["last"] < 0.8 * far.weight_distance["last"]
    assert near.curve[-1].train_loss > far.curve[-1].train_loss
