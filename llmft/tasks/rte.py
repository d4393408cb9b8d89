"""RTE (GLUE) in domain, HANS (McCoy et al. 2019) out of domain.

`rte` is GLUE's validation set (277 rows). `hans` is the lexical-overlap part of HANS, the out-of-domain number of Mosbach et
al. 2023; `hans_subsequence` and `hans_constituent` are the two other heuristics (10,000 rows each). Results are also given
per subcase.
"""

from __future__ import annotations

from llmft.config import DataRef
from llmft.data import Example, Source, Task, TaskData, TestSet, labelled_examples
from llmft.tasks._hans import HANS, HEURISTICS, hans_tests
from llmft.tasks._nli import NLI_PATTERNS, NLI_VERBALIZERS

GLUE = ("nyu-mll/glue", "rte")
HOLDS = "sentence1, sentence2, label (0 entailment, 1 not_entailment)"
TRAIN = Source(("rte_train.parquet", "train.parquet"), (*GLUE, "train", "main"), holds=HOLDS)
VALIDATION = Source(("rte_validation.parquet", "validation.parquet"), (*GLUE, "validation", "main"), holds=HOLDS)


class Rte(Task):
    labels = ("entailment", "not_entailment")
    patterns = NLI_PATTERNS
    verbalizers = NLI_VERBALIZERS
    in_domain = "rte"
    out_of_domain = tuple(HEURISTICS)
    sources = (TRAIN, VALIDATION, HANS)

    def load(self, data: DataRef) -> TaskData:
        def rows(source: Source, name: str) -> tuple[Example, ...]:
            return labelled_examples(source.rows(data), name, {"premise": "sentence1", "hypothesis": "sentence2"}, 2)

        tests = (TestSet("rte", "in", rows(VALIDATION, "rte_validation")), *hans_tests(data))
        return TaskData(rows(TRAIN, "rte_train"), tests, revision=HANS.origin(data))


TASK = Rte()
