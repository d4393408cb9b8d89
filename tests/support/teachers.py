"""What a distillation is checked against: transformers' own forward over whole prompts, and losses of all inputs."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.config.patterns import render_prompt
from llmft.config.spec import TrialSpec
from llmft.models.batches import make_batch
from llmft.models.loading import borrow_model
from llmft.prompting.encoding import SHOTS
from llmft.trial.distillation import run_teacher
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from support.small_models import CPU


def teaching(spec: TrialSpec):
    """The setting of a trial after its lessons, the lessons, and what the record says of the teacher."""
    setting = prepare_trial(spec)
    encoded, lessons = encode_prompts(spec, setting), encode_teacher_prompts(spec, setting)
    return setting, encoded, lessons, run_teacher(spec, setting, encoded, lessons, CPU).teacher


@torch.no_grad()
def logits_of(folder: str, prompts: list[str]) -> np.ndarray:
    """[prompts, vocabulary]: every prompt whole, one at a time, through transformers."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return np.stack([network(**tokenizer(text, return_tensors="pt")).logits[0, -1].double().numpy() for text in prompts])


def prompts_of(spec: TrialSpec, setting, demonstrations, examples, instruction="") -> list[str]:
    pattern, words = setting.task.patterns[spec.pattern], ("Yes", "No")
    shown = [(example.fields, words[example.label]) for example in demonstrations]
    return [render_prompt(pattern, shown, example.fields, spec.separator, instruction) for example in examples]


def word_ids(setting) -> list[int]:
    return [ids[0] for ids in setting.words.ids]


def losses(spec: TrialSpec):
    """The loss of all inputs at once, one at a time, the student's logits by transformers' own forward, and the setting."""
    setting, encoded, _, _ = teaching(spec)
    method, queries = setting.method, encoded.sets[SHOTS]
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        method.prepare(model, 2, torch.Generator().manual_seed(0))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            whole = float(method.loss(model, make_batch(queries, range(len(queries)), setting.words, model, prefix_ids=encoded.prefix)))
            each = [
                float(method.loss(model, make_batch(queries, [i], setting.words, model, prefix_ids=encoded.prefix)))
                for i in range(len(queries))
            ]
            student = np.stack(
                [model.network(torch.tensor([[*encoded.prefix, *ids]])).logits[0, -1].double().numpy() for ids in queries.suffixes]
            )
    return whole, each, student, setting


def teacher_logits(spec: TrialSpec, setting) -> np.ndarray:
    inputs, found = setting.training_examples, {}
    for lesson, prompts in zip(setting.recipe.teacher.prompts, encode_teacher_prompts(spec, setting), strict=True):
        texts = prompts_of(spec, setting, prompts.demonstrations, [inputs[i] for i in lesson.examples])
        if texts:
            found |= dict(zip(lesson.examples, logits_of(spec.model.path, texts), strict=True))
    return np.stack([found[i] for i in range(len(inputs))])
