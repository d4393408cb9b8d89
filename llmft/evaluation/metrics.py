"""The numbers of one set, from its predictions. What scikit-learn has is scikit-learn's; those of texts are in `text_metrics`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from llmft.data import Example
from llmft.evaluation.predictions import Generated, Predictions
from llmft.evaluation.text_metrics import corpus_bleu, example_scores
from llmft.records import SetMetrics

N_BINS = 10


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = N_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): the mean gap between confidence and accuracy over equal-width bins.

    Args:
        probabilities: [n, labels], rows sum to one.
        labels: [n] gold indices.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)  # bin b is (b / n, (b + 1) / n]
    gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def set_metrics(predictions: Predictions | Generated, examples: Sequence[Example], label_names: Sequence[str], domain: str) -> SetMetrics:
    """Every number of one test set. Accuracies per label and group are shares in [0, 1]; labels absent from the set are left out."""
    if isinstance(predictions, Generated):
        return text_metrics(predictions, domain)
    from sklearn.metrics import f1_score, matthews_corrcoef

    gold, predicted = predictions.labels, predictions.predicted
    present = np.unique(gold)
    correct = predicted == gold
    recall = {label_names[label]: float(correct[gold == label].mean()) for label in present}
    groups: dict[str, dict[str, list[bool]]] = {}
    for example, right in zip(examples, correct, strict=True):
        for grouping, value in example.groups.items():
            groups.setdefault(grouping, {}).setdefault(value, []).append(bool(right))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one label only: the correlation is 0 by convention, which is what we want
        mcc = float(matthews_corrcoef(gold, predicted))
    free = predictions.free
    return SetMetrics(
        n=len(gold),
        score=predictions.score,
        accuracy=float(correct.mean()),
        macro_accuracy=float(np.mean(list(recall.values()))),
        macro_f1=float(f1_score(gold, predicted, average="macro", labels=present, zero_division=0)),
        mcc=mcc,
        calibration_error=calibration_error(np.exp(predictions.log_probabilities), gold),
        loss=predictions.loss,
        full_vocabulary_accuracy=None if free is None else float((free == gold).mean()),
        non_label_share=None if free is None else float((free < 0).mean()),
        majority_share=float(np.bincount(gold).max() / len(gold)),
        label_shares={name: float((gold == label).mean()) for label, name in enumerate(label_names)},
        predicted_shares={name: float((predicted == label).mean()) for label, name in enumerate(label_names)},
        label_accuracy=recall,
        group_accuracy={
            grouping: {value: float(np.mean(right)) for value, right in sorted(values.items())} for grouping, values in groups.items()
        },
        domain=domain,
    )


def text_metrics(generated: Generated, domain: str) -> SetMetrics:
    """Every number of one test set whose answers are texts."""
    scores = example_scores(generated.texts, generated.references)
    bleu, signature = corpus_bleu(generated.texts, generated.references)
    return SetMetrics(
        n=len(generated.texts),
        metric=generated.metric,
        score=generated.score,
        **{name: float(values.mean()) for name, values in scores.items()},
        bleu=bleu,
        bleu_signature=signature,
        empty_share=sum(not text for text in generated.texts) / len(generated.texts),
        cut_share=float((~generated.finished).mean()),
        domain=domain,
    )
