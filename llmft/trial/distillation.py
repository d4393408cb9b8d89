"""A teacher's answers to the training examples, before the training: the targets of a distillation, or texts.

They are constant, so they are computed once, by a model that nothing was added to, and this model is gone before the training
begins. Where there are several rounds, the student itself computes them anew for each but the first. A shared prefix is encoded
once for each teacher prompt, as in evaluation, and the examples are shared out over the processes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from llmft.config import TrialSpec
from llmft.errors import UserError
from llmft.evaluation import Evaluator, Generated
from llmft.methods import Distillation, build_method
from llmft.models import AdaptedModel, borrow_model
from llmft.prompting import DEV, INPUTS, Decoding, EncodedTrial
from llmft.records import Teacher, TeacherRound
from llmft.runtime import Runtime, choose_device
from llmft.seeds import derive
from llmft.trial.preparation import PreparedTrial, encode_dev_alone


@dataclass(frozen=True)
class Teaching:
    """What a teacher has answered; its targets are in `Method.teacher_targets`.

    Attributes:
        teacher: what the record says of it; None where there is none.
        texts: those of its texts that are trained on, by the examples' ids.
        responses: all of its texts, as a parquet file's bytes; None where there are none.
    """

    teacher: Teacher | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    responses: bytes | None = None


def run_teacher(
    spec: TrialSpec, trial: PreparedTrial, encoded: EncodedTrial, prompts: Sequence[EncodedTrial], runtime: Runtime
) -> Teaching:
    """Have the teacher answer the training examples, and score it on dev.

    Args:
        encoded: the prompts of the trial itself; the teacher reads dev from there as well, without what its own prompts show it.
        prompts: the teacher's, from `llmft.trial.preparation.encode_teacher_prompts`.

    Raises:
        TrialFailure: a target is not finite (DIVERGED), or the time is over (TIMEOUT).
        UserError: nothing that it says can be trained on.
    """
    distillation, ref = trial.recipe.teacher, spec.teacher or spec.model
    if distillation is None:
        return Teaching()
    began, is_model = time.perf_counter(), ref == spec.model
    with borrow_model(
        ref,
        spec.precision,
        choose_device(runtime.device),
        spec.train.dropout if is_model else None,  # which changes nothing here, but finds the model where the training will
        copied=False,
        kept=is_model and runtime.world_size == 1,
    ) as model:
        adapted = AdaptedModel(build_method("zero_shot", {}), model)
        runtime.wrap(adapted)
        decoding = trial.decoding
        if decoding:  # in the teacher's own tokens; sampled with other noise than the student's answers
            decoding = replace(decoding, tokenizer=trial.teacher_info.tokenizer, seed=derive(spec.dropout_seed, "responses"))
        zero_shot, n_alone = _score_alone(spec, trial, adapted, encoded, runtime, decoding)
        unprepended = [replace(encoded_prompt, n_virtual_tokens=0) for encoded_prompt in prompts]
        dev_score, generated, n_tokens = _read_prompts(adapted, trial, distillation, unprepended, runtime, decoding)
        teacher = Teacher(
            model=ref.name,
            dev_score=dev_score,
            zero_shot_dev_score=zero_shot,
            demonstrations=[example.id for example in prompts[0].demonstrations],
            n_demonstrations_dropped=max(encoded_prompt.n_dropped for encoded_prompt in prompts),
            n_parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            n_tokens=n_alone + n_tokens,
        )
    if generated is None:
        teacher.rounds.append(_round(trial, distillation, dev_score))
        teaching = Teaching(teacher)
    else:
        teaching = Teaching(teacher, *_keep_texts(trial, distillation, generated, teacher))
    teacher.wall_s = time.perf_counter() - began
    return teaching


def refresh_targets(
    adapted: AdaptedModel, trial: PreparedTrial, prompts: Sequence[EncodedTrial], runtime: Runtime, teaching: Teaching
) -> None:
    """Replace the teacher targets by the student's own predictions, and record the round in the teacher of `teaching`.

    Raises:
        TrialFailure, UserError: as `run_teacher`.
    """
    distillation, teacher, began = trial.recipe.teacher, teaching.teacher, time.perf_counter()
    assert distillation is not None and teacher is not None, "a method without a teacher has no rounds"
    dev_score, _, n_tokens = _read_prompts(adapted, trial, distillation, prompts, runtime)
    teacher.rounds.append(_round(trial, distillation, dev_score))
    teacher.n_tokens += n_tokens
    teacher.wall_s += time.perf_counter() - began


def _score_alone(
    spec: TrialSpec, trial: PreparedTrial, adapted: AdaptedModel, encoded: EncodedTrial, runtime: Runtime, decoding: Decoding | None
) -> tuple[float | None, int]:
    """The teacher's zero-shot score on dev, and the tokens that it took; none where its own prompts say no more than the student's."""
    distillation = trial.recipe.teacher
    assert distillation is not None
    is_prompted = any(prompt.demonstrations or prompt.instruction for prompt in distillation.prompts)
    if DEV not in encoded.sets or distillation.teacher_is_model or (decoding and not is_prompted):
        return None, 0
    alone = encode_dev_alone(spec, trial) if decoding else encoded
    evaluator = Evaluator(adapted, alone, trial.words, runtime, decoding)
    return evaluator.predict(DEV).score, evaluator.n_tokens


def _read_prompts(
    adapted: AdaptedModel,
    trial: PreparedTrial,
    distillation: Distillation,
    prompts: Sequence[EncodedTrial],
    runtime: Runtime,
    decoding: Decoding | None = None,
) -> tuple[float | None, Generated | None, int]:
    """Have a model read the teacher prompts, and fill `Method.teacher_targets`.

    Returns:
        Its score on dev, the texts that it answers with, and the tokens that went through it; None where there are none.
    """
    dev_score: float | None = None
    generated: Generated | None = None
    n_tokens = 0
    n_examples, targets = len(trial.training_examples), trial.method.teacher_targets
    for prompt, encoded in zip(distillation.prompts, prompts, strict=True):
        evaluator = Evaluator(adapted, encoded, trial.words, runtime, decoding)  # in place of the last, whose prefix goes
        if distillation.targets is None:
            predictions = evaluator.predict(INPUTS)
            assert isinstance(predictions, Generated), "a teacher of label words has targets"
            generated = predictions
        elif INPUTS in encoded.sets:
            for name, rows in evaluator.read_targets(INPUTS, distillation.targets).items():
                whole = targets.setdefault(name, torch.zeros(n_examples, *rows.shape[1:], dtype=rows.dtype))
                whole[list(prompt.examples)] = rows
        if DEV in encoded.sets:
            dev_score = evaluator.predict(DEV).score
        n_tokens += evaluator.n_tokens
    return dev_score, generated, n_tokens


def _round(trial: PreparedTrial, distillation: Distillation, dev_score: float | None) -> TeacherRound:
    n_trusted = distillation.count_selected(trial.method.teacher_targets)
    return TeacherRound(dev_score=dev_score, n_asked=len(trial.training_examples), n_trusted=n_trusted)


def _keep_texts(trial: PreparedTrial, distillation: Distillation, generated: Generated, teacher: Teacher) -> tuple[dict[str, str], bytes]:
    """Select the texts that can be trained on, and count them in `teacher`; gives them by the examples' ids, and all as a table."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (prompt,) = distillation.prompts
    asked = [trial.training_examples[i] for i in prompt.examples]
    keep_truncated = distillation.keep_truncated_texts
    trained = [bool(text) and bool(end or keep_truncated) for text, end in zip(generated.texts, generated.finished, strict=True)]
    if not any(trained):
        raise UserError(
            f"teacher: none of the {len(asked)} answers of {teacher.model} is a text that came to its end. Raise "
            "generation.max_new_tokens, set generation.stop to what ends an answer, give another teacher or context, or set "
            "keep_unfinished to true."
        )
    columns = {name: [example.fields[name] for example in asked] for name in asked[0].fields}
    table = pa.table({
        "id": [example.id for example in asked], **columns, "response": generated.texts,
        "finished": generated.finished, "trained_on": trained,
    })  # fmt: skip
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    teacher.n_asked, teacher.n_responses = len(asked), sum(trained)
    teacher.n_empty, teacher.n_unfinished = sum(not text for text in generated.texts), int((~generated.finished).sum())
    texts = {example.id: text for example, text, good in zip(asked, generated.texts, trained, strict=True) if good}
    return texts, buffer.getvalue()
