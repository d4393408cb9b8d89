"""What a model says about the training inputs before anything is trained: the targets of a distillation.

They are constant, so they are computed once, by a model that nothing was added to, and this model is gone before the training
begins. A shared opening is encoded once for each lesson, as in evaluation, and the inputs are shared out over the processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llmft.adapted import Adapted
from llmft.evaluate import Evaluator
from llmft.method import Method
from llmft.model import borrow_model, choose_device
from llmft.record import Teacher
from llmft.runtime import Runtime
from llmft.setting import DEV, INPUTS, Setting
from llmft.spec import TrialSpec
from llmft.tokens import EncodedTrial


class Untouched(Method):
    """A model that reads lessons: nothing of it is trained, and it keeps what the method that learns wants kept."""

    trains = False

    def __init__(self, learner: Method):
        super().__init__()
        self.targets = learner.targets


def teach(
    spec: TrialSpec, setting: Setting, encoded: EncodedTrial, lessons: Sequence[EncodedTrial], runtime: Runtime
) -> Teacher | None:
    """Put the targets of all inputs into `setting.method.taught`, and say how good the teacher is; None without lessons.

    Args:
        encoded: the prompts of the trial itself; the teacher reads dev from there as well, without what a lesson shows it.
        lessons: from `llmft.setting.encode_lessons`.

    Raises:
        TrialFailure: a target is not finite (DIVERGED), or the time is over (TIMEOUT).
    """
    if not lessons:
        return None
    began, method, ref = time.perf_counter(), setting.method, spec.teacher or spec.model
    is_itself = ref == spec.model
    with borrow_model(
        ref,
        spec.precision,
        choose_device(runtime.device),
        spec.train.dropout if is_itself else None,  # which changes nothing here, but finds the model where the training will
        copied=False,
        kept=is_itself and runtime.world_size == 1,
    ) as model:
        adapted = Adapted(Untouched(method), model)
        runtime.wrap(adapted)
        reader = Evaluator(adapted, encoded, setting.words, runtime)
        scores = [reader.predict(DEV).score] if DEV in encoded.sets else []
        n_inputs, n_tokens = len(method.inputs(setting.draw)), reader.n_tokens
        for lesson, prompts in zip(setting.lessons, lessons, strict=True):
            reader = Evaluator(adapted, prompts, setting.words, runtime)  # in place of the last, whose prefix goes
            if INPUTS in prompts.sets:
                for name, rows in reader.read_targets(INPUTS).items():
                    whole = method.taught.setdefault(name, torch.zeros(n_inputs, *rows.shape[1:], dtype=rows.dtype))
                    whole[list(lesson.inputs)] = rows
            if DEV in prompts.sets:
                scores.append(reader.predict(DEV).score)
            n_tokens += reader.n_tokens
        return Teacher(
            model=ref.name,
            dev_score=scores[1] if scores else None,
            zero_shot_dev_score=scores[0] if scores else None,
            demonstrations=[example.id for example in lessons[0].demonstrations],
            n_demonstrations_dropped=max(lesson.n_dropped for lesson in lessons),
            n_parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            n_tokens=n_tokens,
            wall_s=time.perf_counter() - began,
        )
