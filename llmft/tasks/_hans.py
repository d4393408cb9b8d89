"""HANS (McCoy et al. 2019): the out-of-domain test of the tasks of textual entailment, by heuristic.

`hans` is the lexical-overlap part, the out-of-domain number of Mosbach et al. 2023; `hans_subsequence` and `hans_constituent` are
the two other heuristics (10,000 rows each, in 10 subcases).
"""

from __future__ import annotations

from llmft.config import DataRef
from llmft.data import Example, Source, TestSet, checked_fields, checked_label, numbered
from llmft.errors import UserError

HANS = Source(
    ("hans.parquet", "hans_validation.parquet", "heuristics_evaluation_set.txt", "hans_regenerated.parquet"),
    ("jhu-cogsci/hans", None, "validation", "refs/convert/parquet"),
    holds="premise, hypothesis, label (0 entailment, 1 not_entailment), heuristic, subcase",
)
HEURISTICS = {"hans": "lexical_overlap", "hans_subsequence": "subsequence", "hans_constituent": "constituent"}
ORIGINAL_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}  # of the authors' text file
ORIGINAL_LABELS = {"entailment": 0, "non-entailment": 1}


def hans_tests(data: DataRef) -> list[TestSet]:
    """The three test sets; labels are 0, entailment, and 1, not entailment.

    Raises:
        UserError: the file is missing or damaged, or a row is not as it should be.
    """
    by_heuristic: dict[str, list[Example]] = {heuristic: [] for heuristic in HEURISTICS.values()}
    for id_, where, row in numbered(HANS.rows(data), "hans"):
        if "gold_label" in row:
            row = {ORIGINAL_COLUMNS.get(column, column): value for column, value in row.items()}
            row["label"] = ORIGINAL_LABELS.get(row["label"], row["label"])
        fields = checked_fields(row, {"premise": "premise", "hypothesis": "hypothesis"}, where)
        groups = checked_fields(row, {"heuristic": "heuristic", "subcase": "subcase"}, where)
        if groups["heuristic"] not in by_heuristic:
            raise UserError(f"{where}: heuristic {groups['heuristic']!r} is not one of {', '.join(by_heuristic)}.")
        by_heuristic[groups["heuristic"]].append(Example(id_, fields, checked_label(row, 2, where), groups))
    return [TestSet(name, "out", tuple(by_heuristic[heuristic])) for name, heuristic in HEURISTICS.items()]
