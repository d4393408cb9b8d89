"""One trial: a spec in, a record out."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from llmft import cost
from llmft.adapted import Adapted
from llmft.batches import hardest_step, query_budget, smaller_budget, split_by_tokens
from llmft.checkpoints import Checkpoint, Fit
from llmft.distributed import is_lost_peer
from llmft.errors import Cause, OutOfMemory, TrialFailure, UserError
from llmft.evaluate import Evaluator
from llmft.forgetting import check_alone, check_forgetting, measure, measure_base, pair
from llmft.method import Method
from llmft.model import borrow_model, load_tokenizer, n_parameters
from llmft.optimizers import check_optimizer
from llmft.quantised import check_bitsandbytes
from llmft.record import Cost, Measure, Teacher
from llmft.result import TrialResult, failed_record, finished_record, predictions_file
from llmft.runtime import Runtime, choose_device
from llmft.seeds import derive
from llmft.setting import DEV, Setting, encode_lessons, encode_prompts, settle
from llmft.spec import TrialSpec
from llmft.teacher import teach, teach_again
from llmft.tokens import EncodedTrial
from llmft.train import fit
from llmft.weights import gather_weights

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""How libraries say it that have no exception of their own for it (torch on a CPU, cuBLAS, cuDNN)."""


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
        result, smaller = Fit(), None
        try:
            return _run(spec, runtime, began, result)
        except OutOfMemory as failure:
            if runtime.world_size > 1:
                raise
            cause, message, smaller = failure.cause, failure.message, failure.smaller
        except TrialFailure as failure:
            cause, message = failure.cause, failure.message
        except Exception as error:  # a failure is a row, also one that nobody foresaw
            cause, message = _reason(error)
            if runtime.world_size > 1:
                raise TrialFailure(cause, message) from error
        if smaller is None:
            return TrialResult(failed_record(spec, runtime, time.perf_counter() - began, result, cause, message))
        runtime = replace(runtime, micro_batch_tokens=smaller, n_out_of_memory=runtime.n_out_of_memory + 1)
        gc.collect()  # only here: while an error is handled, its traceback holds the tensors of every frame that it came through
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reason(error: Exception) -> tuple[Cause, str]:
    if isinstance(error, UserError):
        return Cause.USER_ERROR, str(error)
    if _is_out_of_memory(error):
        return Cause.OUT_OF_MEMORY, str(error).split("\n")[0] or type(error).__name__
    if is_lost_peer(error):
        return Cause.LOST, f"another process of the group ended: {error}"
    return Cause.CRASHED, f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def check_spec(spec: TrialSpec, here: bool = True) -> None:
    """Find every mistake that can be found without the weights.

    Args:
        here: whether the trial will run on this machine, so that it must have what the trial needs.

    Raises:
        UserError: one line that says what, where, what is allowed and how to mend it.
    """
    method = settle(spec).method
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


def _run(spec: TrialSpec, runtime: Runtime, began: float, result: Fit) -> TrialResult:
    setting, device = settle(spec), choose_device(runtime.device)
    method, alone = setting.method, runtime.world_size == 1  # a process of a group is started for one trial
    _check_machine(spec, method, device)
    _check_group(spec, method, runtime)
    began, before = _base_measures(spec, method, runtime, device, began)
    memory = cost.PeakMemory(device)
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
        adapted = Adapted(method, model)
        module, evaluator = runtime.wrap(adapted), Evaluator(adapted, encoded, setting.words, runtime, setting.decoding, setting.reasoning)
        started = time.perf_counter()
        with _smaller_passes(spec, [encoded, *lessons], runtime):
            if method.trains:
                fit(spec, module, evaluator, domains, result, partial(teach_again, adapted, setting, lessons, runtime, teacher))
            else:
                _score(evaluator, domains, result)
            finished = time.perf_counter()
            after = measure(adapted, spec.model, spec.forgetting, runtime) if spec.forgetting and method.trains else before
            measured = time.perf_counter()
        if method.trains:
            method.fold(adapted)
            result.virtual_tokens = adapted("virtual_tokens", load_tokenizer(spec.model))
        weights = gather_weights(model, runtime) if method.trains and runtime.keep_weights else None
        spent = Cost(
            wall_s=finished - began,
            train_s=finished - started if method.trains else 0.0,
            evaluate_s=0.0 if method.trains else finished - started,
            forgetting_s=measured - finished,
            device=cost.device_name(device),
            peak_memory_bytes=int(runtime.largest(memory.n_bytes)),
            n_parameters=n_in_all,
            n_trainable_parameters=n_trainable,
            stored_bytes=sum(p.numel() * p.element_size() for p in model.network.parameters() if p.requires_grad),
            tokens_per_query=_tokens_per_query(encoded, domains),
            **_work_done(result, evaluator, teacher, n_in_all),
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
    spec: TrialSpec, setting: Setting, runtime: Runtime
) -> tuple[EncodedTrial, list[EncodedTrial], Teacher | None, bytes | None]:
    """The trial's prompts, and those of the lessons that are read again during the training; with what a teacher says where there is
    one: who it was, and its answers' file."""
    encoded, lessons = encode_prompts(spec, setting), encode_lessons(spec, setting)
    with _smaller_passes(spec, [*lessons, encoded], runtime):
        teacher, responses = teach(spec, setting, encoded, lessons, runtime)
    again = lessons if setting.method.n_rounds > 1 else []
    return encode_prompts(spec, setting) if responses else encoded, again, teacher, responses


def _work_done(result: Fit, evaluator: Evaluator, teacher: Teacher | None, n_parameters: int) -> dict[str, float]:
    """Fields of `Cost` about steps, tokens and arithmetic."""
    of_teacher = cost.flops(teacher.n_parameters, 0, teacher.n_tokens) if teacher else 0.0
    return {
        "tokens_trained": result.n_tokens,
        "tokens_evaluated": evaluator.n_tokens,
        "tokens_teacher": teacher.n_tokens if teacher else 0,
        "flops": cost.flops(n_parameters, result.n_tokens, evaluator.n_tokens) + of_teacher,
        "n_steps": result.n_steps,
    }


def _base_measures(
    spec: TrialSpec, method: Method, runtime: Runtime, device: torch.device, began: float
) -> tuple[float, list[Measure]]:
    """What the base model can do, and `began` without the time that this took: all trials of a model share it."""
    if spec.forgetting is None or method.has_own_head:
        return began, []
    started = time.perf_counter()
    measured = measure_base(spec, spec.forgetting, runtime, device)
    return began + time.perf_counter() - started, measured


def _score(evaluator: Evaluator, domains: Mapping[str, str], result: Fit) -> None:
    """The result of a method that trains nothing: one 'checkpoint', the model as it is."""
    if evaluator.content_free is not None:
        result.content_free = evaluator.content_free.tolist()
    dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
    result.checkpoints["none"] = Checkpoint(
        0, dev.score if dev else None, dev.loss if dev else None, predictions=evaluator.predict_all(list(domains))
    )
    result.weight_distance["none"] = 0.0


@contextmanager
def _smaller_passes(spec: TrialSpec, encoded: Sequence[EncodedTrial], runtime: Runtime) -> Iterator[None]:
    """Say what to try next where the forward passes over the `encoded` prompts run out of memory."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        passes = [lengths for prompts in encoded for lengths in _passes(spec, prompts, runtime)]
        raise OutOfMemory(_reason(error)[1], smaller_budget(passes)) from error


def _passes(spec: TrialSpec, encoded: EncodedTrial, runtime: Runtime) -> Iterator[list[int]]:
    """The lengths of what one process gets in its largest forward passes, pass by pass; without a prefix that is encoded once."""
    budget, n_processes = runtime.micro_batch_tokens, runtime.world_size
    for name in encoded.sets:
        if name in encoded.trained:
            own = sorted(encoded.lengths(name), reverse=True)
            groups = hardest_step(own, spec.train.batch_size, budget, choose_device(runtime.device), n_processes)
        else:
            apart = encoded.shares_prefix and not encoded.n_new_tokens
            read = map(len, encoded.sets[name].suffixes) if apart else encoded.lengths(name)
            own = sorted((length + encoded.n_new_tokens for length in read), reverse=True)[::n_processes]
            groups = split_by_tokens(own, budget if encoded.n_new_tokens else query_budget(budget, len(encoded.prefix) * apart))
        yield from ([own[i] for i in group] for group in groups)


def _tokens_per_query(encoded: EncodedTrial, names: Mapping[str, str]) -> float:
    lengths = [length for name in list(names) or [DEV] for length in encoded.lengths(name)]
    return sum(lengths) / max(1, len(lengths))
