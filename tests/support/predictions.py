"""Metrics of made-up predictions."""

from __future__ import annotations

import numpy as np

from llmft.data.task import Example
from llmft.evaluation.metrics import set_metrics
from llmft.evaluation.predictions import Predictions


def of_predictions(gold, said, free=None, names=("entailment", "not_entailment")):
    probabilities = np.full((len(gold), len(names)), 0.4 / (len(names) - 1))
    probabilities[np.arange(len(gold)), said] = 0.6
    predictions = Predictions(np.asarray(gold), np.log(probabilities), None if free is None else np.asarray(free))
    examples = [Example(str(i), {}, int(label)) for i, label in enumerate(gold)]
    return set_metrics(predictions, examples, names, "in")
