"""A generated NLI task in the manner of HANS: needs no data and no network (see `llmft.tasks._toy_language`).

An example's rationale is the words that premise and hypothesis share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

from llmft.config import DataRef
from llmft.data import Example, Task, TaskData, TestSet
from llmft.tasks._nli import NLI_PATTERNS, NLI_VERBALIZERS
from llmft.tasks._toy_language import Pair, shared_words, toy_data


def _examples(pairs: Iterable[Pair], name: str) -> tuple[Example, ...]:
    return tuple(
        Example(
            f"{name}/{index}",
            {"premise": pair.premise, "hypothesis": pair.hypothesis},
            pair.label,
            {"heuristic": pair.heuristic, "subcase": pair.subcase} if pair.heuristic else {},
            rationale=shared_words(pair),
        )
        for index, pair in enumerate(pairs)
    )


class Toy(Task):
    labels = ("entailment", "not_entailment")
    patterns = NLI_PATTERNS
    verbalizers = NLI_VERBALIZERS
    in_domain = "toy"
    out_of_domain = ("toy_hans",)
    needs_data = False

    def resolve_data(self, directory: str | None) -> DataRef:
        return DataRef(fingerprint=_fingerprint())

    def load(self, data: DataRef) -> TaskData:
        rows = toy_data()
        tests = (
            TestSet("toy", "in", _examples(rows.in_domain, "toy")),
            TestSet("toy_hans", "out", _examples(rows.out_of_domain, "toy_hans")),
        )
        return TaskData(_examples(rows.train, "toy_train"), tests, revision="generated")


@cache
def _fingerprint() -> str:
    return hashlib.sha256(repr(toy_data()).encode()).hexdigest()[:16]


TASK = Toy()
