"""One trial: a spec in, a record out."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from llmft.config import TrialSpec
from llmft.errors import OutOfMemory, TrialFailure, UserError
from llmft.evaluation import Evaluator
from llmft.methods import Method
from llmft.models import (
    AdaptedModel,
    borrow_model,
    check_bitsandbytes,
    load_tokenizer,
    n_parameters,
)
from llmft.prompting import DEV, EncodedTrial
from llmft.records import Cost, Measure, Teacher
from llmft.runtime import Runtime, choose_device
from llmft.seeds import derive
from llmft.training import Checkpoint, TrainingResult, check_optimizer, train
from llmft.trial.cost import PeakMemory, device_name, tokens_per_query, work_done
from llmft.trial.distillation import refresh_targets, run_teacher
from llmft.trial.failures import cause_and_message, suggest_smaller_passes
from llmft.trial.forgetting import check_alone, check_forgetting, measure, measure_base, pair
from llmft.trial.preparation import PreparedTrial, encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.result import TrialResult, failed_record, finished_record, predictions_file
from llmft.trial.weights import gather_weights


def run_trial(spec: TrialSpec, runtime: Runtime = Runtime()) -> TrialResult:
    """Adapt one model to one task once, and say how it did in and out of domain.

    A trial that fails is a record with a typed cause. One that runs out of memory runs again from its start with smaller forward
    passes, which changes no answer, until it fits or every pass is a single query.

    Raises:
        TrialFailure: only in a group of processes, for what one of them may have met alone (no memory, a file that is not there, a
            crash): the others wait for it, so whoever started the group must end it. `OutOfMemory` says what to try next.
    """
    runtime, began = runtime.started(), time.perf_counter()
    while True:
        result, smaller = TrainingResult(), None
        try:
            return _run(spec, runtime, began, result)
        except OutOfMemory as failure:
            if runtime.world_size > 1:
                raise
            cause, message, smaller = failure.cause, failure.message, failure.smaller
        except TrialFailure as failure:
            cause, message = failure.cause, failure.message
        except Exception as error:  # a failure is a row, also one that nobody foresaw
            cause, message = cause_and_message(error)
            if runtime.world_size > 1:
                raise TrialFailure(cause, message) from error
        if smaller is None:
            return TrialResult(failed_record(spec, runtime, time.perf_counter() - began, result, cause, message))
        runtime = replace(runtime, micro_batch_tokens=smaller, n_out_of_memory=runtime.n_out_of_memory + 1)
        gc.collect()  # only here: while an error is handled, its traceback holds the tensors of every frame that it came through
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_spec(spec: TrialSpec, here: bool = True) -> None:
    """Find every mistake that can be found without the weights.

    Args:
        here: whether the trial will run on this machine, so that it must have what the trial needs.

    Raises:
        UserError: one line that says what, where, what is allowed and how to mend it.
    """
    method = prepare_trial(spec).method
    if here:
        _check_machine(spec, method, choose_device(None))
    check_forgetting(spec)


def _check_machine(spec: TrialSpec, method: Method, device: torch.device) -> None:
    if method.base_weights == "nf4":
        check_bitsandbytes(f"method '{spec.method}'")
    if method.trains:
        check_optimizer(spec.train, device)
    if spec.precision == "fp16" and device.type != "cuda":
        raise UserError(f"precision: fp16 needs a CUDA device, and this is {device.type}. Use fp32 or bf16.")


def _run(spec: TrialSpec, runtime: Runtime, began: float, result: TrainingResult) -> TrialResult:
    setting, device = prepare_trial(spec), choose_device(runtime.device)
    method, alone = setting.method, runtime.world_size == 1  # a process of a group is started for one trial
    _check_machine(spec, method, device)
    _check_group(spec, method, runtime)
    began, before = _base_measures(spec, method, runtime, device, began)
    memory = PeakMemory(device)
    encoded, lessons, teacher, responses = _read_lessons(spec, setting, runtime)
    domains = {test.name: test.domain for test in setting.tests}
    dropout = spec.train.dropout if method.trains else None
    with borrow_model(
        spec.model, spec.precision, device, dropout, copied=method.trains, kept=alone, base_weights=method.base_weights
    ) as model:
        n_in_all = n_parameters(model.network)
        if method.trains:
            method.prepare(model, len(setting.task.labels), torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        n_trainable = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
        adapted = AdaptedModel(method, model)
        module, evaluator = runtime.wrap(adapted), Evaluator(adapted, encoded, setting.words, runtime, setting.decoding, setting.reasoning)
        started = time.perf_counter()
        with suggest_smaller_passes(spec, [encoded, *lessons], runtime):
            if method.trains:
                train(spec, module, evaluator, domains, result, partial(refresh_targets, adapted, setting, lessons, runtime, teacher))
            else:
                _score(evaluator, domains, result)
            finished = time.perf_counter()
            after = measure(adapted, spec.model, spec.forgetting, runtime) if spec.forgetting and method.trains else before
            measured = time.perf_counter()
        if method.trains:
            method.fold(adapted)
            result.virtual_tokens = adapted(method.virtual_tokens, load_tokenizer(spec.model))
        weights = gather_weights(model, runtime) if method.trains and runtime.keep_weights else None
        spent = Cost(
            wall_s=finished - began,
            train_s=finished - started if method.trains else 0.0,
            evaluate_s=0.0 if method.trains else finished - started,
            forgetting_s=measured - finished,
            device=device_name(device),
            peak_memory_bytes=int(runtime.largest(memory.n_bytes)),
            n_parameters=n_in_all,
            n_trainable_parameters=n_trainable,
            stored_bytes=sum(p.numel() * p.element_size() for p in model.network.parameters() if p.requires_grad),
            tokens_per_query=tokens_per_query(encoded, domains),
            **work_done(result, evaluator, teacher, n_in_all),
            n_workers=runtime.world_size,
            micro_batch_tokens=runtime.micro_batch_tokens,
            n_out_of_memory=runtime.n_out_of_memory,
        )
    record = finished_record(spec, setting, encoded, result, spent, teacher)
    record = record.model_copy(update={"forgetting": pair(before, after)})
    return TrialResult(record, predictions_file(setting, result), weights, responses)


def _check_group(spec: TrialSpec, method: Method, runtime: Runtime) -> None:
    """Refuse what only one process can do."""
    if method.base_weights == "nf4" and runtime.world_size > 1:
        raise UserError(f"method '{spec.method}': a base in 4 bits is not trained by several processes. Use one GPU a trial.")
    check_alone(spec, runtime)


def _read_lessons(
    spec: TrialSpec, setting: PreparedTrial, runtime: Runtime
) -> tuple[EncodedTrial, list[EncodedTrial], Teacher | None, bytes | None]:
    """The trial's prompts, and those of the lessons that are read again during the training; with what a teacher says where there is
    one: who it was, and its answers' file."""
    encoded, lessons = encode_prompts(spec, setting), encode_teacher_prompts(spec, setting)
    with suggest_smaller_passes(spec, [*lessons, encoded], runtime):
        teacher, responses = run_teacher(spec, setting, encoded, lessons, runtime)
    again = lessons if setting.method.n_rounds > 1 else []
    return encode_prompts(spec, setting) if responses else encoded, again, teacher, responses


def _base_measures(spec: TrialSpec, method: Method, runtime: Runtime, device: torch.device, began: float) -> tuple[float, list[Measure]]:
    """What the base model can do, and `began` without the time that this took: all trials of a model share it."""
    if spec.forgetting is None or method.has_own_head:
        return began, []
    started = time.perf_counter()
    measured = measure_base(spec, spec.forgetting, runtime, device)
    return began + time.perf_counter() - started, measured


def _score(evaluator: Evaluator, domains: Mapping[str, str], result: TrainingResult) -> None:
    """The result of a method that trains nothing: one 'checkpoint', the model as it is."""
    if evaluator.content_free is not None:
        result.content_free = evaluator.content_free.tolist()
    dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
    result.checkpoints["none"] = Checkpoint(
        0, dev.score if dev else None, dev.loss if dev else None, predictions=evaluator.predict_all(list(domains))
    )
    result.weight_distance["none"] = 0.0
