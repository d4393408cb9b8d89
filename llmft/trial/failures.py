"""TODO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llmft.config import TrialSpec
from llmft.errors import Cause, OutOfMemory, UserError
from llmft.models import (
    batch_by_tokens,
    is_lost_peer,
    largest_training_step,
    query_budget,
    smaller_budget,
)
from llmft.prompting import EncodedTrial
from llmft.runtime import Runtime, choose_device

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""How libraries say it that have no exception of their own for it (torch on a CPU, cuBLAS, cuDNN)."""


def cause_and_message(error: Exception) -> tuple[Cause, str]:
    if isinstance(error, UserError):
        return Cause.USER_ERROR, str(error)
    if is_out_of_memory(error):
        return Cause.OUT_OF_MEMORY, str(error).split("\n")[0] or type(error).__name__
    if is_lost_peer(error):
        return Cause.LOST, f"another process of the group ended: {error}"
    return Cause.CRASHED, f"{type(error).__name__}: {error}"


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


@contextmanager
def suggest_smaller_passes(spec: TrialSpec, encoded: Sequence[EncodedTrial], runtime: Runtime) -> Iterator[None]:
    """Say what to try next where the forward passes over the `encoded` prompts run out of memory."""
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
