"""Imports of torch, transformers, Ray and pandas, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_ours = False


def own_this_process() -> None:
    """From now on what `collector_off` imports is not looked through by later collections either.

    For a process that does nothing but llmft's work: whatever it held by then is never collected, garbage of others included.
    """
    global _ours
    _ours = True


@contextmanager
def collector_off() -> Iterator[None]:
    """Within: nothing is collected.

    Modules stay. Looking through them while they come takes a quarter of the time of an import, and looking through those of torch
    and transformers, which a collection does at some trials later, as long as three short trials.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _ours:
            gc.freeze()
        if was_on:
            gc.enable()


@cache
def import_for_trials() -> None:
    """Everything that the first trial of a worker's process would import while it runs; once, for what a later trial leaves to the
    collector must not be kept from it."""
    own_this_process()
    with collector_off():
        import ray.train.torch  # noqa: F401
        import sklearn.metrics  # noqa: F401

        import llmft.trial  # noqa: F401
