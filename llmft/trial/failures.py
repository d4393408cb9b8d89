"""What becomes of a trial that fails: a record with a typed cause, or, where memory was too small, another attempt."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from llmft.config import TrialSpec
from llmft.errors import Cause, OutOfMemory, TrialFailure, UserError
from llmft.models import batch_by_tokens, is_lost_peer, largest_training_step, query_budget, smaller_budget
from llmft.prompting import EncodedTrial
from llmft.runtime import Runtime, choose_device
from llmft.training import TrainingResult
from llmft.trial.result import TrialResult, failed_record

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""How libraries say it that have no exception of their own for it (torch on a CPU, cuBLAS, cuDNN)."""


def run_attempts(
    attempt: Callable[[TrialSpec, Runtime, TrainingResult, float], TrialResult], spec: TrialSpec, runtime: Runtime
) -> TrialResult:
    """Run a trial until it fits into memory, with smaller forward passes each time; any other failure becomes a record.

    Args:
        attempt: runs the trial; fills the result that it is given step by step, so that a failure leaves what was known. It is also
            given the `time.perf_counter()` at which the first attempt began.

    Raises:
        TrialFailure: as `llmft.trial.run.run_trial`.
    """
    runtime, began = runtime.started(), time.perf_counter()
    while True:
        result, smaller = TrainingResult(), None
        try:
            return attempt(spec, runtime, result, began)
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


def cause_and_message(error: Exception) -> tuple[Cause, str]:
    """Classify an error that ended a trial."""
    if isinstance(error, UserError):
        return Cause.USER_ERROR, str(error)
    if is_out_of_memory(error):
        return Cause.OUT_OF_MEMORY, str(error).split("\n")[0] or type(error).__name__
    if is_lost_peer(error):
        return Cause.LOST, f"another process of the group ended: {error}"
    return Cause.CRASHED, f"{type(error).__name__}: {error}"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in NO_MEMORY)
    )


@contextmanager
def suggest_smaller_passes(spec: TrialSpec, encoded: Sequence[EncodedTrial], runtime: Runtime) -> Iterator[None]:
    """Raise OutOfMemory with what to try next where the forward passes over the `encoded` prompts run out of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        passes = [lengths for prompts in encoded for lengths in _passes(spec, prompts, runtime)]
        raise OutOfMemory(cause_and_message(error)[1], smaller_budget(passes)) from error


def _passes(spec: TrialSpec, encoded: EncodedTrial, runtime: Runtime) -> Iterator[list[int]]:
    """The lengths of what one process gets in its largest forward passes, pass by pass; without a prefix that is encoded once."""
    budget, n_processes = runtime.micro_batch_tokens, runtime.world_size
    for name in encoded.sets:
        if name in encoded.trained:
            own = sorted(encoded.lengths(name), reverse=True)
            groups = largest_training_step(own, spec.train.batch_size, budget, choose_device(runtime.device), n_processes)
        else:
            apart = encoded.shares_prefix and not encoded.n_new_tokens
            read = map(len, encoded.sets[name].suffixes) if apart else encoded.lengths(name)
            own = sorted((length + encoded.n_new_tokens for length in read), reverse=True)[::n_processes]
            groups = batch_by_tokens(own, budget if encoded.n_new_tokens else query_budget(budget, len(encoded.prefix) * apart))
        yield from ([own[i] for i in group] for group in groups)
