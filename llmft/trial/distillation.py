"""What a model says about the training inputs before it is trained on: the targets of a distillation, or texts.

They are constant, so they are computed once, by a model that nothing was added to, and this model is gone before the training
begins. Where there are several rounds, the student itself computes them anew for each but the first. A shared opening is encoded
once for each lesson, as in evaluation, and the inputs are shared out over the processes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from llmft.config import TrialSpec
from llmft.errors import UserError
from llmft.evaluation import Evaluator, Generated
from llmft.methods import Method
from llmft.models import AdaptedModel, borrow_model, load_tokenizer
from llmft.prompting import DEV, INPUTS, Decoding, EncodedTrial
from llmft.records import Teacher, TeacherRound
from llmft.runtime import Runtime, choose_device
from llmft.seeds import derive
from llmft.trial.preparation import PreparedTrial, encode_alone


class FrozenTeacher(Method):
    """A model that reads lessons: nothing of it is trained, and it keeps what the method that learns wants kept."""

    trains = False

    def __init__(self, learner: Method):
        super().__init__()
        self.targets = learner.targets


def run_teacher(
    spec: TrialSpec, setting: PreparedTrial, encoded: EncodedTrial, lessons: Sequence[EncodedTrial], runtime: Runtime
) -> tuple[Teacher | None, bytes | None]:
    """Put the targets of all inputs into `setting.method.taught`, or their texts into `responses`, and say how good the teacher is.

    Args:
        encoded: the prompts of the trial itself; the teacher reads dev from there as well, without what a lesson shows it.
        lessons: from `llmft.trial.preparation.encode_teacher_prompts`.

    Returns:
        What the record says of the teacher, and its texts as a parquet file's bytes; None where there are none.

    Raises:
        TrialFailure: a target is not finite (DIVERGED), or the time is over (TIMEOUT).
        UserError: nothing that it says can be trained on.
    """
    if not lessons:
        return None, None
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
        adapted = AdaptedModel(FrozenTeacher(method), model)
        runtime.wrap(adapted)
        decoding, alone = setting.decoding, encoded
        if decoding:  # in the teacher's own words; sampled with other noise than the student's answers
            decoding = replace(decoding, tokenizer=load_tokenizer(ref), seed=derive(spec.dropout_seed, "responses"))
            alone = encode_alone(spec, setting) if DEV in encoded.sets else encoded
        is_told = any(lesson.demonstrations or lesson.instruction for lesson in setting.lessons)
        reader = Evaluator(adapted, alone, setting.words, runtime, decoding)
        reads_alone = DEV in encoded.sets and (is_told or not decoding)  # else a tuned teacher would be compared with itself
        zero_shot = reader.predict(DEV).score if reads_alone else None
        n_alone = reader.n_tokens
        del reader  # its prefix goes
        untouched = [replace(prompts, n_virtual_tokens=0) for prompts in lessons]
        dev_score, texts, n_tokens = _read(adapted, setting, untouched, runtime, decoding)
        responses, counts = _answer(setting, texts, ref.name) if decoding else (None, {"rounds": [_round(method, dev_score)]})
        teacher = Teacher(
            model=ref.name,
            dev_score=dev_score,
            zero_shot_dev_score=zero_shot,
            demonstrations=[example.id for example in lessons[0].demonstrations],
            n_demonstrations_dropped=max(lesson.n_dropped for lesson in lessons),
            n_parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            n_tokens=n_alone + n_tokens,
            wall_s=time.perf_counter() - began,
            **counts,
        )
    return teacher, responses


def refresh_targets(
    adapted: AdaptedModel, setting: PreparedTrial, lessons: Sequence[EncodedTrial], runtime: Runtime, teacher: Teacher
) -> None:
    """Put what the student itself, `adapted`, says to its lessons in the place of the targets, and a further round into `teacher`.

    Raises:
        TrialFailure, UserError: as `teach`.
    """
    began = time.perf_counter()
    dev_score, _, n_tokens = _read(adapted, setting, lessons, runtime)
    teacher.rounds.append(_round(setting.method, dev_score))
    teacher.n_tokens += n_tokens
    teacher.wall_s += time.perf_counter() - began


def _read(
    adapted: AdaptedModel, setting: PreparedTrial, lessons: Sequence[EncodedTrial], runtime: Runtime, decoding: Decoding | None = None
) -> tuple[float | None, Generated | None, int]:
    """Have a model read the lessons, and fill `setting.method.taught`.

    Returns:
        Its score on dev, the texts that it answers with, and the tokens that went through it; None where there are none.
    """
    method, dev_score, texts, n_tokens = setting.method, None, None, 0
    n_inputs = len(method.inputs(setting.draw))
    for lesson, prompts in zip(setting.lessons, lessons, strict=True):
        reader = Evaluator(adapted, prompts, setting.words, runtime, decoding)  # in place of the last, whose prefix goes
        if decoding:
            texts = reader.predict(INPUTS)
        elif INPUTS in prompts.sets:
            for name, rows in reader.read_targets(INPUTS, method.targets).items():
                whole = method.taught.setdefault(name, torch.zeros(n_inputs, *rows.shape[1:], dtype=rows.dtype))
                whole[list(lesson.inputs)] = rows
        if DEV in prompts.sets:
            dev_score = reader.predict(DEV).score
        n_tokens += reader.n_tokens
    return dev_score, texts, n_tokens


def _round(method: Method, dev_score: float | None) -> TeacherRound:
    return TeacherRound(dev_score=dev_score, n_asked=len(next(iter(method.taught.values()))), n_trusted=method.n_trusted())


def _answer(setting: PreparedTrial, generated: Generated, teacher: str) -> tuple[bytes, dict[str, int]]:
    """Put the texts that can be trained on into `setting.method.responses`; gives all of them as a table, and their numbers."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    method = setting.method
    (lesson,) = setting.lessons
    asked = [method.inputs(setting.draw)[i] for i in lesson.inputs]
    trained = [bool(text) and bool(end or method.keeps_unfinished) for text, end in zip(generated.texts, generated.finished, strict=True)]
    if not any(trained):
        raise UserError(
            f"teacher: none of the {len(asked)} answers of {teacher} is a text that came to its end. Raise generation.max_new_tokens, "
            "set generation.stop to what ends an answer, give another teacher or context, or set keep_unfinished to true."
        )
    method.responses = {e.id: text for e, text, good in zip(asked, generated.texts, trained, strict=True) if good}
    columns = {field: [example.fields[field] for example in asked] for field in asked[0].fields}
    table = pa.table({
        "id": [example.id for example in asked], **columns, "response": generated.texts,
        "finished": generated.finished, "trained_on": trained,
    })  # fmt: skip
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    n_empty, n_unfinished = sum(not text for text in generated.texts), int((~generated.finished).sum())
    return buffer.getvalue(), {"n_asked": len(asked), "n_responses": sum(trained), "n_empty": n_empty, "n_unfinished": n_unfinished}
