"""Each divergence against scipy, and top-k against a sum by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from llmft.methods.modules.divergence import divergence, keep_and_sum_rest

EXPECTED = {
    "kl": lambda p, q: entropy(p, q),
    "js": lambda p, q: jensenshannon(p, q) ** 2,
    "mse": lambda p, q: ((p - q) ** 2).sum(),
    "l1": lambda p, q: np.abs(p - q).sum(),
}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_divergence_is_what_scipy_says(kind):
    teacher, student = drawn(0, 4, 3, 7).log_softmax(-1), drawn(1, 4, 3, 7).log_softmax(-1)
    ours = divergence(kind, teacher, student)
    assert ours.shape == (4, 3)
    for place in np.ndindex(4, 3):
        p, q = teacher[place].exp().double().numpy(), student[place].exp().double().numpy()
        assert float(ours[place]) == pytest.approx(EXPECTED[kind](p, q), rel=1e-4)
    assert divergence(kind, teacher, teacher).abs().max() < 1e-6


def test_the_kl_is_forward():
    sure, unsure = torch.tensor([0.98, 0.02]).log(), torch.tensor([0.5, 0.5]).log()
    assert divergence("kl", sure, unsure) == pytest.approx(0.98 * np.log(1.96) + 0.02 * np.log(0.04))
    assert divergence("kl", unsure, sure) != pytest.approx(float(divergence("kl", sure, unsure)))


def test_the_k_best_words_and_a_rest_sum_to_one():
    logits = drawn(2, 5, 100)
    teacher, student = logits.log_softmax(-1), drawn(3, 5, 100).log_softmax(-1)
    words = teacher.topk(50).indices
    for whole in (teacher, student):
        kept = keep_and_sum_rest(whole, words)
        assert kept.shape == (5, 51)
        torch.testing.assert_close(kept.exp().sum(-1), torch.ones(5))
        for row in range(5):
            others = [i for i in range(100) if i not in words[row].tolist()]
            assert float(kept[row, -1].exp()) == pytest.approx(float(whole[row, others].exp().sum()), rel=1e-4)
            torch.testing.assert_close(kept[row, :-1], whole[row, words[row]])


def test_a_rest_of_almost_nothing_has_a_gradient():
    logits = torch.tensor([[80.0, 0.0, -30.0, -40.0]], requires_grad=True)
    keep_and_sum_rest(logits.log_softmax(-1), torch.tensor([[0]])).sum().backward()
    assert logits.grad.isfinite().all()
