"""What can go wrong, in two kinds: a mistake of the user's, and a trial that failed.

Both are picklable (Ray carries them between processes), and both print as one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum


class UserError(Exception):
    """A mistake that the user can mend: says where, what was got, what is allowed and how to fix it. Never retried."""


def unknown_name(kind: str, name: str, allowed: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not one of `allowed`, with the nearest one that is."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{where + ': ' if where else ''}unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'none'}.")


class Cause(StrEnum):
    """Why a trial failed. A sweep decides by the cause whether to try again."""

    DIVERGED = "diverged"  # the loss or a weight became NaN or infinite
    OUT_OF_MEMORY = "out_of_memory"
    QUERY_TOO_LONG = "query_too_long"  # a query does not fit the model's context, even without demonstrations
    USER_ERROR = "user_error"
    CRASHED = "crashed"  # an exception that we did not foresee
    LOST = "lost"  # the process that ran the trial died
    TIMEOUT = "timeout"  # it took longer than the plan allows
    PRUNED = "pruned"  # the search gave it up early, for points of earlier rounds did better at the same epoch


class TrialFailure(Exception):
    """A trial that cannot give a number; becomes a failed record.

    Args:
        cause: the kind of failure.
        message: one line for a person.
    """

    def __init__(self, cause: Cause, message: str):
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self) -> str:
        return f"{self.cause.value}: {self.message}"


class OutOfMemory(TrialFailure):
    """A trial that does not fit as it was run.

    Args:
        message: one line for a person.
        smaller: the `Runtime.micro_batch_tokens` with which it may fit; None if every forward pass was a single query already.
    """

    def __init__(self, message: str, smaller: int | None):
        super().__init__(Cause.OUT_OF_MEMORY, message)
        self.args, self.smaller = (message, smaller), smaller
