"""MNLI without its neutral pairs in domain, HANS (McCoy et al. 2019) out of domain.

As in Mosbach et al. 2023: contradiction is `not_entailment`. `mnli` is the matched validation set (6,692 of 9,815 rows remain);
HANS is as in the task `rte`; `mnli_mismatched`, from genres that the training pool lacks (Williams et al. 2018), is the mildest of
the out-of-domain sets. `mnli_merged` and `mnli_3way` are the same data with the neutral pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmft.config import DataRef
from llmft.data import Example, Source, Task, TaskData, TestSet, checked_fields, checked_label, numbered
from llmft.tasks._hans import HANS, HEURISTICS, hans_tests
from llmft.tasks._nli import NLI_PATTERNS, NLI_VERBALIZERS

GLUE = ("nyu-mll/glue", "mnli")
HOLDS = "premise, hypothesis, label (0 entailment, 1 neutral, 2 contradiction)"
TRAIN = Source(("mnli_train.parquet",), (*GLUE, "train", "main"), holds=HOLDS)
MATCHED = Source(("mnli_validation_matched.parquet",), (*GLUE, "validation_matched", "main"), holds=HOLDS)
MISMATCHED = Source(("mnli_validation_mismatched.parquet",), (*GLUE, "validation_mismatched", "main"), holds=HOLDS)
FIELDS = {"premise": "premise", "hypothesis": "hypothesis"}


class Mnli(Task):
    labels = ("entailment", "not_entailment")
    patterns = NLI_PATTERNS
    verbalizers = NLI_VERBALIZERS
    in_domain = "mnli"
    out_of_domain = (*HEURISTICS, "mnli_mismatched")
    sources = (TRAIN, MATCHED, MISMATCHED, HANS)
    label_of: Mapping[int, int] = {0: 0, 2: 1}  # MNLI's label -> ours; rows with others are left out

    def load(self, data: DataRef) -> TaskData:
        tests = [TestSet(self.in_domain, "in", self._examples(MATCHED, data, "mnli_validation_matched"))]
        tests += self._hans(data)
        tests.append(TestSet("mnli_mismatched", "out", self._examples(MISMATCHED, data, "mnli_validation_mismatched")))
        revision = ", ".join(source.origin(data) for source in (MATCHED, *self.sources[3:]))
        return TaskData(self._examples(TRAIN, data, "mnli_train"), tuple(tests), revision=revision)

    def _hans(self, data: DataRef) -> list[TestSet]:
        return hans_tests(data)

    def _examples(self, source: Source, data: DataRef, name: str) -> tuple[Example, ...]:
        rows = ((id_, where, row, checked_label(row, 3, where)) for id_, where, row in numbered(source.rows(data), name))
        return tuple(
            Example(id_, checked_fields(row, FIELDS, where), self.label_of[label])
            for id_, where, row, label in rows
            if label in self.label_of
        )


TASK = Mnli()
