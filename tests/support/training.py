"""Training one method on the small models, with all weights after it."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmft.data.task import Example
from llmft.evaluation.evaluator import Evaluator
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import borrow_model
from llmft.runtime import Runtime
from llmft.seeds import derive
from llmft.training import loop
from llmft.training.checkpoints import TrainingResult
from llmft.trial.preparation import PreparedTrial, encode_prompts, prepare_trial
from support.small_models import CPU


def train(spec, runtime: Runtime = CPU):
    """What `llmft.training.train` leaves, and every weight after the last step."""
    spec = spec.model_copy(update={"selections": ("last",)})
    setting = prepare_trial(spec)
    encoded, domains = encode_prompts(spec, setting), {test.name: test.domain for test in setting.tests}
    with borrow_model(spec.model, spec.precision, torch.device("cpu"), spec.train.dropout) as model:
        setting.method.prepare(model, 2, torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        adapted, result = AdaptedModel(setting.method, model), TrainingResult()
        evaluator = Evaluator(adapted, encoded, setting.words, runtime)
        loop.train(spec, setting.recipe, runtime.wrap(adapted), evaluator, domains, result)
        return result, {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}


def with_shots(trial: PreparedTrial, shots: tuple[Example, ...]) -> PreparedTrial:
    """The trial with other shots, all of which are trained on."""
    return replace(trial, draw=replace(trial.draw, shots=shots), recipe=replace(trial.recipe, trained_shots=shots))


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
