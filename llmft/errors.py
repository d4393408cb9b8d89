"""What can go wrong, in two kinds: a mistake of the user's, and a trial that failed.

Both are picklable (Ray carries them between processes), and both print as one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake that the user can mend: says where, what was got, what is allowed and how to fix it. Never retried."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: one that is spelled alike, or where one is the initials of the other (lr, rank)."""
    known = sorted(known)
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    initials = [each for each in known if name == _initials(each) or each == _initials(name)]
    return next(iter(alike or initials or difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))


def unknown_name(kind: str, name: str, allowed: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not one of `allowed`, with the nearest one that is."""
    allowed = sorted(allowed)
    near = nearest(str(name), allowed)
    hint = f" Did you mean {near!r}?" if near else ""
    return UserError(f"{where + ': ' if where else ''}unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'none'}.")


def error_lines(
    error: ValidationError,
    where: str,
    allowed: Mapping[str, Iterable[str]] | None = None,
    belongs: Callable[[str, str], str] | None = None,
) -> str:
    """One line for a pydantic ValidationError: where, what was got, what is allowed.

    Args:
        where: file or option that holds the value.
        allowed: per section ("" for the top) the names that are known there, for the nearest one.
        belongs: section and key -> the section where an unknown key is known, or "".
    """
    problems, lines = error.errors(include_url=False), []
    for problem in problems:
        *parents, key = problem["loc"] or ("",)
        path, section = ".".join(map(str, problem["loc"])), ".".join(map(str, parents))
        if problem["type"] == "extra_forbidden":
            names = sorted((allowed or {}).get(section, ()))
            if belongs and (other := belongs(section, str(key))):
                lines.append(f"unknown key '{path}'. {key} belongs under '{other}'.")
                continue
            near = nearest(str(key), names)
            hint = f" Did you mean '{near}'?" if near else ""
            lines.append(f"unknown key '{path}'.{hint}" + (f" Keys: {', '.join(names)}." if names else ""))
        elif not any(_inside(other["loc"], problem["loc"]) for other in problems):  # the cause is said alone
            lines.append(f"{path + ': ' if path else ''}{_said(problem)}")
    return f"{where}: " + "; ".join(lines)


def _inside(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _said(problem: ErrorDetails) -> str:
    """What is wrong with a value, in the words of a YAML file."""
    got: Any = problem["input"]
    shown = f" (got {got!r})" if isinstance(got, str | int | float | list | tuple | None) else ""
    match problem["type"]:
        case "missing":
            return "is missing"
        case "too_short":
            return "is empty; name at least one"
        case "list_type" | "tuple_type":
            return f"must be a list, as in [{got}]" if isinstance(got, str | int | float) else f"must be a list{shown}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"must be a mapping, as in {{name: value}}{shown}"
    return problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be") + shown


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
