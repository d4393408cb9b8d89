"""Which of a teacher's answers are learned from, against transformers' own forward over whole prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from support.small_models import CPU
from support.teachers import losses, teacher_logits, teaching, word_ids

from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.models.batches import make_batch
from llmft.models.loading import borrow_model
from llmft.prompting.encoding import SHOTS
from llmft.trial.run import run_trial

DISTILLED = "context_distillation"
CORRECT = {"n_unlabelled": 6, "distil_shots": True, "only_correct": True}
CONFIDENT = {"n_unlabelled": 10, "min_confidence": 0.6}
BOTH = CORRECT | CONFIDENT


def selected_by_hand(settings: dict, setting, teacher: np.ndarray) -> np.ndarray:
    """[inputs], 1 or 0, from the teacher's logits."""
    said = softmax(teacher[:, word_ids(setting)], axis=1)
    selected = said.max(1) >= settings.get("min_confidence", 0)
    if "only_correct" in settings:
        gold = [None] * len(setting.draw.unlabelled) + [shot.label for shot in setting.draw.shots]
        selected &= [label is None or label == best for label, best in zip(gold, said.argmax(1), strict=True)]
    return selected.astype(float)


@pytest.mark.parametrize("settings", [CORRECT, CONFIDENT, BOTH], ids=["correct", "confident", "both"])
@pytest.mark.parametrize("over", ["label_words", "vocabulary", "top_k"])
def test_the_loss_by_hand(spec_of, settings, over):
    """The mean over those that are selected; of a batch of one, its share of it."""
    spec = spec_of(DISTILLED, settings | {"over": over, "k": 10, "temperature": 2.0}, n_shots=8)
    whole, each, student, setting = losses(spec)
    teacher = teacher_logits(spec, setting)
    selected = selected_by_hand(settings, setting, teacher)
    if over == "label_words":
        teacher, student = teacher[:, word_ids(setting)], student[:, word_ids(setting)]
    p, q = softmax(teacher / 2, axis=1), softmax(student / 2, axis=1)
    if over == "top_k":
        best = np.argsort(-p, axis=1)[:, :10]
        p, q = (np.take_along_axis(x, best, 1) for x in (p, q))
        p, q = (np.c_[x, 1 - x.sum(1)] for x in (p, q))
    apart = 4 * selected * np.array([entropy(a, b) for a, b in zip(p, q, strict=True)])
    assert 2 <= selected.sum() <= len(selected) - 2, "some are selected and some are not"
    assert whole == pytest.approx(apart.sum() / selected.sum(), rel=1e-3)
    np.testing.assert_allclose(each, apart * len(selected) / selected.sum(), rtol=1e-3, atol=1e-6)


def test_pseudo_labels_are_selected_too(spec_of):
    spec = spec_of(DISTILLED, CONFIDENT | {"distance": "pseudo_labels"}, n_shots=4)
    whole, _, student, setting = losses(spec)
    teacher = teacher_logits(spec, setting)
    selected = selected_by_hand(CONFIDENT, setting, teacher).astype(bool)
    said = teacher[:, word_ids(setting)].argmax(1)
    right = -log_softmax(student[:, word_ids(setting)], axis=1)[np.arange(10), said]
    assert 0 < selected.sum() < 10 and whole == pytest.approx(right[selected].mean(), rel=1e-3)


def test_the_cross_entropy_is_over_all_shots_whatever_the_teacher_says(spec_of):
    spec = spec_of(DISTILLED, CORRECT | {"cross_entropy_weight": 0.3}, n_shots=8)
    whole, each, student, setting = losses(spec)
    teacher, own = teacher_logits(spec, setting), student[:, word_ids(setting)]
    selected = selected_by_hand(CORRECT, setting, teacher).astype(bool)
    p, q = softmax(teacher[:, word_ids(setting)], axis=1), softmax(own, axis=1)
    apart = np.array([entropy(a, b) for a, b in zip(p, q, strict=True)])
    right = -log_softmax(own, axis=1)[6 + np.arange(8), [shot.label for shot in setting.draw.shots]]
    assert not selected[6:].all()
    assert whole == pytest.approx(0.7 * apart[selected].mean() + 0.3 * right.mean(), rel=1e-3)
    assert np.mean(each) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("settings", [CORRECT, CONFIDENT], ids=["correct", "confident"])
def test_no_gradient_comes_from_what_is_not_selected(spec_of, settings):
    spec = spec_of(DISTILLED, settings, n_shots=8)
    setting, encoded, _, _ = teaching(spec)
    selected = selected_by_hand(settings, setting, teacher_logits(spec, setting))
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        setting.method.prepare(model, 2, torch.Generator().manual_seed(0))
        for place, counts in enumerate(selected):
            model.network.zero_grad(set_to_none=True)
            setting.method.loss(model, make_batch(encoded.sets[SHOTS], [place], setting.words, model)).backward()
            largest = max(float(p.grad.abs().max()) for p in model.network.parameters() if p.grad is not None)
            assert (largest > 0) == bool(counts)


@pytest.mark.parametrize("settings", [CORRECT | {"cross_entropy_weight": 0.5}, CONFIDENT], ids=["correct", "confident"])
def test_small_passes_change_no_answer(spec_of, settings):
    spec = spec_of(DISTILLED, settings, n_shots=8, epsilon=1e-4)
    first, second = (run_trial(spec, replace(CPU, micro_batch_tokens=n)).record for n in (16384, 60))
    assert [p.train_loss for p in first.curve] == pytest.approx([p.train_loss for p in second.curve], abs=1e-4)


@pytest.mark.parametrize("settings", [BOTH, CONFIDENT, {"n_unlabelled": 5}], ids=["both", "confident", "all"])
def test_the_record_counts_what_was_selected(spec_of, settings):
    spec = spec_of(DISTILLED, settings, n_shots=8)
    record, (setting, *_) = run_trial(spec, CPU).record, teaching(spec)
    (only,) = record.teacher.rounds
    expected = selected_by_hand(settings, setting, teacher_logits(spec, setting)).sum()
    assert (only.n_asked, only.n_trusted) == (len(setting.training_examples), expected)
    assert ("few_trusted" in {finding.code for finding in record.findings}) == (2 * expected < only.n_asked)


def test_a_trial_in_which_no_answer_is_trusted_says_so(spec_of):
    record = run_trial(spec_of(DISTILLED, CONFIDENT | {"min_confidence": 1.0}), CPU).record
    assert record.cause == "user_error" and not record.curve
    assert record.message.startswith("min_confidence 1: none of the teacher's 10 answers is so good")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"only_correct": True}, "only_correct needs labelled inputs: set distil_shots to true"),
        ({"min_confidence": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(UserError) as raised:
        build_method(DISTILLED, settings)
    assert said in str(raised.value) and "\n" not in str(raised.value)
