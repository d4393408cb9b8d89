"""Catastrophic forgetting: what a model could do before it was adapted, and can after.

Measured are tasks of llmft (zero-shot, in their first pattern, on their in-domain set), tasks of lm-evaluation-harness and the
perplexity of a text. Both models see the same prompts in the same precision. The base model is measured once in a process. How far the
weights have moved is in every record, measured or not (`weight_distance`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmft.config import DataRef, FileRef, ForgettingSpec, ModelRef, TrialSpec
from llmft.errors import UserError
from llmft.evaluation import UNBOUNDED, Evaluator, check_lm_eval, measures, resolve_folder, run_lm_eval, set_metrics, text_likelihood
from llmft.methods import build_method
from llmft.models import AdaptedModel, borrow_model, read_model_info
from llmft.records import Change, Measure
from llmft.runtime import Runtime
from llmft.tasks import load_task
from llmft.trial.preparation import encode_prompts, prepare_trial

_OF_BASE: dict[tuple, list[Measure]] = {}


def resolve_forgetting(
    tasks: Sequence[str] = (),
    harness: Sequence[str] = (),
    harness_dir: str | None = None,
    text: str | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
) -> ForgettingSpec:
    """Resolve what is to be measured, with fingerprints of what is read; the arguments are a plan's `forgetting` and `data_dir`.

    Raises:
        UserError: a task is not known, or a file, a folder or a task's data is not there.
    """
    return ForgettingSpec(
        tasks={name: load_task(name).resolve_data(data_dir) for name in tasks},
        harness=tuple(harness),
        harness_dir=resolve_folder(harness_dir) if harness_dir else None,
        text=resolve_text(text) if text else None,
        limit=limit,
    )


def resolve_text(path: str) -> FileRef:
    """Resolve a text file to its path and a fingerprint of its contents.

    Raises:
        UserError: it cannot be read as UTF-8, or holds no text.
    """
    file = Path(path).expanduser().resolve()
    read_text(file)
    return FileRef(path=str(file), fingerprint=hashlib.sha256(file.read_bytes()).hexdigest()[:16])


def read_text(file: Path) -> str:
    """Read the text whose perplexity is measured.

    Raises:
        UserError: it cannot be read as UTF-8, or holds no text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"text: {file} cannot be read ({why}). Give a file of plain UTF-8 text.") from None
    if not text.strip():
        raise UserError(f"text: {file} holds no text.")
    return text


def check_forgetting(spec: TrialSpec) -> None:
    """Find what would keep a trial from measuring what its spec asks for.

    Raises:
        UserError: a task is not known, the harness is not installed, the text is not there, or the model is no decoder.
    """
    if (wanted := spec.forgetting) is None:
        return
    if wanted.harness:
        check_lm_eval(wanted.harness, wanted.harness_dir.path if wanted.harness_dir else None)
    if wanted.text:
        read_text(Path(wanted.text.path))
        if read_model_info(spec.model).is_encoder_decoder:
            raise UserError("forgetting.text: only a decoder model has a perplexity; this one is an encoder-decoder.")
    for name, data in wanted.tasks.items():
        prepare_trial(zero_shot_spec(spec.model, name, data, wanted.limit))


def check_alone(spec: TrialSpec, runtime: Runtime) -> None:
    """Check that a group of processes is not asked to measure forgetting.

    Raises:
        UserError: the spec asks for it.
    """
    if spec.forgetting and runtime.world_size > 1:
        raise UserError(
            "forgetting: is measured by one process, and this trial has several. Remove it from the plan, set keep_weights: true "
            "and run llmft evaluate afterwards, where the model fits on one device; or set the model's gpus to 1."
        )


def measure(adapted: AdaptedModel, ref: ModelRef, wanted: ForgettingSpec, runtime: Runtime, progress: bool = False) -> list[Measure]:
    """Measure what the model can do, as it is.

    Args:
        adapted: the model, placed on its device; a method with a head of its own can be asked nothing and gives an empty list.
        ref: the base model, for its tokenizer and context.
        progress: whether the harness shows its progress on the terminal.

    Raises:
        UserError: as `llmft.evaluation.lm_eval.run_lm_eval`.
        TrialFailure: a query does not fit the model, a number is not finite, or the time is over.
    """
    if adapted.method.has_own_head:
        return []
    measured, info = [], read_model_info(ref)
    length = info.context_length if info.is_bounded else UNBOUNDED
    for name, data in wanted.tasks.items():
        spec = zero_shot_spec(ref, name, data, wanted.limit)
        trial = prepare_trial(spec)
        (test,) = trial.tests
        encoded = replace(encode_prompts(spec, trial), n_virtual_tokens=adapted.n_virtual_tokens)
        predictions = Evaluator(adapted, encoded, trial.words, runtime, trial.decoding).predict(test.name)
        numbers = set_metrics(predictions, test.examples, trial.task.labels, test.domain)
        share = numbers.accuracy
        stderr = math.sqrt(share * (1 - share) / numbers.n) if numbers.metric == "accuracy" else None
        measured.append(Measure(source="llmft", name=name, metric=numbers.metric, value=numbers.score, stderr=stderr, n=numbers.n))
    if wanted.harness:
        folder = wanted.harness_dir.path if wanted.harness_dir else None
        batch_size = min(64, max(1, runtime.micro_batch_tokens // length))
        results = run_lm_eval(
            adapted, info.tokenizer, wanted.harness, folder=folder, limit=wanted.limit, length=length, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        measured += measures(results)
    if wanted.text:
        file = Path(wanted.text.path)
        likelihood = text_likelihood(adapted, info.tokenizer, read_text(file), length, budget=runtime.micro_batch_tokens // 8)
        for metric in ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
            measured.append(
                Measure(
                    source="text", name=file.name, metric=metric, value=getattr(likelihood, metric), n=likelihood.n_tokens,
                    larger_is_better=False,
                )
            )  # fmt: skip
    return measured


def measure_base(spec: TrialSpec, wanted: ForgettingSpec, runtime: Runtime, device: torch.device) -> list[Measure]:
    """Measure what the base model of `spec` can do, once in a process."""
    key = (spec.model.fingerprint or spec.model.name, spec.precision, device.type, wanted.model_dump_json())
    if key not in _OF_BASE:
        with borrow_model(spec.model, spec.precision, device) as model:  # a copy in fp32, as the adapted model's
            adapted = AdaptedModel(build_method("zero_shot", {}), model).to(device)
            _OF_BASE[key] = measure(adapted, spec.model, wanted, runtime)
    return _OF_BASE[key]


def pair(before: Iterable[Measure], after: Iterable[Measure]) -> list[Change]:
    """Pair each number after with its number before, if there is one."""
    earlier = {measured.key: measured for measured in before}
    return [Change(before=earlier.get(measured.key), after=measured) for measured in after]


def zero_shot_spec(ref: ModelRef, task: str, data: DataRef, limit: int | None) -> TrialSpec:
    """Build the spec by which a task of llmft is asked of a model that was not adapted to it."""
    definition = load_task(task)
    return TrialSpec(
        model=ref, task=task, data=data, method="zero_shot", pattern=next(iter(definition.patterns)), n_dev=0, n_test=limit,
        test_sets=(definition.in_domain,), selections=("none",), generation=definition.generation,
    )  # fmt: skip
