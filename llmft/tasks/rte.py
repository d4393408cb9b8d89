"""RTE (GLUE) in domain, HANS (McCoy et al. 2019) out of domain.

`rte` is GLUE's validation set (277 rows). `hans` is the lexical-overlap part of HANS, the out-of-domain number of Mosbach et
al. 2023; `hans_subsequence` and `hans_constituent` are the two other heuristics (10,000 rows each). Results are also given
per subcase.
"""

from __future__ import annotations

from llmft.errors import UserError
from llmft.prompts import NLI_PATTERNS, NLI_VERBALIZERS
from llmft.sources import Source, checked_fields, checked_label, numbered, resolve_sources
from llmft.spec import DataRef
from llmft.task import Example, Task, TaskData, TestSet

GLUE = ("nyu-mll/glue", "rte")
TRAIN = Source(("rte_train.parquet", "train.parquet"), (*GLUE, "train", "main"))
VALIDATION = Source(("rte_validation.parquet", "validation.parquet"), (*GLUE, "validation", "main"))
HANS = Source(
    ("hans.parquet", "hans_validation.parquet", "heuristics_evaluation_set.txt", "hans_regenerated.parquet"),
    ("jhu-cogsci/hans", None, "validation", "refs/convert/parquet"),
)
HEURISTICS = {"hans": "lexical_overlap", "hans_subsequence": "subsequence", "hans_constituent": "constituent"}
ORIGINAL_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}  # of the authors' text file
ORIGINAL_LABELS = {"entailment": 0, "non-entailment": 1}


def _rte(source: Source, data: DataRef, name: str, n_labels: int) -> tuple[Example, ...]:
    columns = {"premise": "sentence1", "hypothesis": "sentence2"}
    return tuple(
        Example(id_, checked_fields(row, columns, where), checked_label(row, n_labels, where))
        for id_, where, row in numbered(source.rows(data), name)
    )


def _hans(data: DataRef, n_labels: int) -> dict[str, list[Example]]:
    by_heuristic: dict[str, list[Example]] = {heuristic: [] for heuristic in HEURISTICS.values()}
    for id_, where, row in numbered(HANS.rows(data), "hans"):
        if "gold_label" in row:
            row = {ORIGINAL_COLUMNS.get(column, column): value for column, value in row.items()}
            row["label"] = ORIGINAL_LABELS.get(row["label"], row["label"])
        fields = checked_fields(row, {"premise": "premise", "hypothesis": "hypothesis"}, where)
        groups = checked_fields(row, {"heuristic": "heuristic", "subcase": "subcase"}, where)
        if groups["heuristic"] not in by_heuristic:
            raise UserError(f"{where}: heuristic {groups['heuristic']!r} is not one of {', '.join(by_heuristic)}.")
        by_heuristic[groups["heuristic"]].append(Example(id_, fields, checked_label(row, n_labels, where), groups))
    return by_heuristic


class Rte(Task):
    labels = ("entailment", "not_entailment")
    patterns = NLI_PATTERNS
    verbalizers = NLI_VERBALIZERS
    in_domain = "rte"
    out_of_domain = tuple(HEURISTICS)

    def resolve_data(self, directory: str | None) -> DataRef:
        return resolve_sources((TRAIN, VALIDATION, HANS), directory)

    def load(self, data: DataRef) -> TaskData:
        n_labels = len(self.labels)
        hans = _hans(data, n_labels)
        tests = [TestSet("rte", "in", _rte(VALIDATION, data, "rte_validation", n_labels))]
        tests += [TestSet(name, "out", tuple(hans[heuristic])) for name, heuristic in HEURISTICS.items()]
        return TaskData(_rte(TRAIN, data, "rte_train", n_labels), tuple(tests), revision=HANS.origin(data))


TASK = Rte()
