from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from llmft.data.task import Example
from llmft.evaluation.metrics import calibration_error, set_metrics
from llmft.evaluation.predictions import Predictions

NAMES = ("yes", "no", "maybe")


def predictions(gold, probabilities, free=None) -> Predictions:
    with np.errstate(divide="ignore"):
        return Predictions(np.asarray(gold), np.log(np.asarray(probabilities)), None if free is None else np.asarray(free))


def examples(gold, groups=None) -> list[Example]:
    return [Example(str(i), {}, label, groups[i] if groups else {}) for i, label in enumerate(gold)]


def random_set(seed: int, n: int = 60, n_labels: int = 3):
    generator = np.random.default_rng(seed)
    return generator.integers(0, n_labels, n), generator.dirichlet([1.0] * n_labels, n)


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_those_of_scikit_learn(seed, n_labels):
    gold, probabilities = random_set(seed, n_labels=n_labels)
    said = probabilities.argmax(1)
    found = set_metrics(predictions(gold, probabilities), examples(gold), NAMES[:n_labels], "in")
    assert found.n == 60
    assert found.accuracy == pytest.approx(sk.accuracy_score(gold, said))
    assert found.macro_accuracy == pytest.approx(sk.balanced_accuracy_score(gold, said))
    assert found.macro_f1 == pytest.approx(sk.f1_score(gold, said, average="macro"))
    assert found.mcc == pytest.approx(sk.matthews_corrcoef(gold, said))
    assert found.loss == pytest.approx(sk.log_loss(gold, probabilities, labels=range(n_labels)))
    recall = sk.recall_score(gold, said, average=None)
    assert found.label_accuracy == pytest.approx(dict(zip(NAMES, recall, strict=False)))


def test_a_set_by_hand():
    gold = [0, 0, 0, 1]
    probabilities = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]
    groups = [{"part": "a"}, {"part": "b"}, {"part": "a"}, {"part": "b"}]
    found = set_metrics(predictions(gold, probabilities, free=[0, -1, -1, 1]), examples(gold, groups), NAMES[:2], "out")
    assert found.accuracy == 0.5 and found.domain == "out"
    assert found.label_accuracy == pytest.approx({"yes": 2 / 3, "no": 0})
    assert found.macro_accuracy == pytest.approx(1 / 3)
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert found.mcc == pytest.approx(-1 / 3)  # TP 2, FN 1, FP 1, TN 0: (0 - 1) / sqrt(3 * 3 * 1 * 1)
    assert found.loss == pytest.approx(-np.log([0.9, 0.8, 0.3, 0.4]).mean())
    assert found.full_vocabulary_accuracy == 0.5 and found.non_label_share == 0.5
    assert found.majority_share == 0.75
    assert found.label_shares == {"yes": 0.75, "no": 0.25}
    assert found.predicted_shares == {"yes": 0.75, "no": 0.25}
    assert found.group_accuracy == {"part": {"a": 0.5, "b": 0.5}}


def test_every_grouping_gets_its_accuracies():
    gold = [0, 0, 1, 1, 0, 1]
    probabilities = [[1, 0], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0]]
    groups = [{"heuristic": "h" if i < 4 else "k", "subcase": f"s{i % 2}"} for i in range(6)]
    found = set_metrics(predictions(gold, probabilities), examples(gold, groups), NAMES[:2], "out").group_accuracy
    assert found == {"heuristic": {"h": 0.75, "k": 0.5}, "subcase": {"s0": 1.0, "s1": pytest.approx(1 / 3)}}


def test_a_label_that_is_absent_counts_for_nothing():
    gold, probabilities = [0, 0, 1], [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]
    found = set_metrics(predictions(gold, probabilities), examples(gold), NAMES, "in")
    assert found.label_accuracy == {"yes": 0.5, "no": 1.0} and found.macro_accuracy == 0.75
    assert found.macro_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert found.predicted_shares == pytest.approx({"yes": 1 / 3, "no": 1 / 3, "maybe": 1 / 3})


def test_a_classification_head_has_no_numbers_of_the_full_vocabulary():
    found = set_metrics(predictions([0, 1], [[0.6, 0.4], [0.6, 0.4]]), examples([0, 1]), NAMES[:2], "in")
    assert found.full_vocabulary_accuracy is None and found.non_label_share is None


def test_a_constant_predictor_has_no_correlation():
    found = set_metrics(predictions([0, 1, 1], [[0.6, 0.4]] * 3), examples([0, 1, 1]), NAMES[:2], "in")
    assert found.mcc == 0 and found.macro_accuracy == 0.5


def test_of_equal_labels_the_first_is_predicted():
    assert predictions([0, 0], [[0.5, 0.5], [0.4, 0.6]]).predicted.tolist() == [0, 1]


def calibration_by_loop(probabilities, gold, n_bins: int = 10) -> float:
    total = 0.0
    for b in range(n_bins):
        inside = [i for i, row in enumerate(probabilities) if b / n_bins < max(row) <= (b + 1) / n_bins]
        if inside:
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            accuracy = sum(int(np.argmax(probabilities[i])) == gold[i] for i in inside) / len(inside)
            total += len(inside) / len(gold) * abs(confidence - accuracy)
    return total


@given(seed=st.integers(0, 10**6), n=st.integers(1, 80), n_labels=st.integers(2, 3))
@settings(max_examples=50, deadline=None)
def test_the_calibration_error_is_that_of_a_plain_loop(seed, n, n_labels):
    gold, probabilities = random_set(seed, n, n_labels)
    assert calibration_error(probabilities, gold) == pytest.approx(calibration_by_loop(probabilities, gold))


def test_calibration_errors_by_hand():
    assert calibration_error(np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 0])) == 0
    assert calibration_error(np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1])) == pytest.approx(0.25)
    assert calibration_error(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1])) == pytest.approx(0)
    border = np.array([[0.5, 0.5], [0.55, 0.45]])  # 0.5 belongs to the bin below: (0.4, 0.5]
    assert calibration_error(border, np.array([0, 1])) == pytest.approx(0.5 * 0.5 + 0.5 * 0.55)
    mixed = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.45, 0.55]])  # three bins: 2 right, 0 of 1, 1 of 1
    assert calibration_error(mixed, np.array([0, 0, 0, 1])) == pytest.approx(0.5 * 0.05 + 0.25 * 0.65 + 0.25 * 0.45)
