"""QQP (GLUE), cut to 1,000 rows, in domain, PAWS-QQP (Zhang et al. 2019) out of domain.

As in the code of Mosbach et al. 2023: numpy's generator is seeded with 123 once, and draws 1,000 rows of the training pool and
then 1,000 of the validation set; `qqp_full` has all rows. PAWS-QQP holds pairs made of the same words, 677 rows of which 28 % are
duplicates. The published accuracies on it are micro for fine-tuning and macro for in-context learning; both are in every record.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from llmft.config import DataRef, Pattern, with_literals
from llmft.data import Example, Source, Task, TaskData, TestSet, labelled_examples, numbered
from llmft.errors import UserError

GLUE = ("nyu-mll/glue", "qqp")
LABEL = "label (0 not_duplicate, 1 duplicate)"
TRAIN = Source(("qqp_train.parquet",), (*GLUE, "train", "main"), holds=f"question1, question2, {LABEL}")
VALIDATION = Source(("qqp_validation.parquet",), (*GLUE, "validation", "main"), holds=f"question1, question2, {LABEL}")
PAWS = Source(
    ("paws_qqp.tsv", "paws_qqp/dev_and_test.tsv", "paws_qqp.parquet", "paws_qqp_clean.parquet"),
    None,
    obtain="data/paws_qqp/dev_and_test.tsv of github.com/uds-lsv/llmft, "
    "sha256 f65890ccffd7a6432520c009dd3e5c03a96205c80a8f89b04bb58f44c1f35c8f",
    holds=f"sentence1, sentence2, {LABEL}",
)
SEED, N_ROWS = 123, 1000


def original_subset(lengths: list[int]) -> list[np.ndarray]:
    """The rows that the original keeps of the splits train, validation, ... of these lengths, in the order in which it drew them."""
    generator = np.random.RandomState(SEED)  # the stream of np.random.seed and np.random.choice, and nobody else's
    return [generator.choice(np.arange(length), min(N_ROWS, length), replace=False) for length in lengths]


def without_literals(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of PAWS-QQP with plain sentences, where they are printed as Python's bytes (`b'...'`)."""
    plain = dict(row)
    for column in ("sentence1", "sentence2"):
        text = row.get(column)
        if isinstance(text, str) and text.startswith(("b'", 'b"')):
            try:
                plain[column] = ast.literal_eval(text).decode("utf-8")
            except (SyntaxError, ValueError, AttributeError):
                raise UserError(f"{where}: column {column!r} is no printed text in UTF-8 (got {text[:40]!r}).") from None
    return plain


class Qqp(Task):
    labels = ("not_duplicate", "duplicate")
    patterns = with_literals(
        {  # Mosbach et al. 2023, Table 5, has no gpt-3 for QQP; this is that of the other tasks
            "minimal": Pattern(template="{question1} {question2} ?", verbalizer="no-yes"),
            "gpt-3": Pattern(template="{question1} question: {question2} Yes or No? answer:", verbalizer="no-yes"),
            "eval-harness": Pattern(
                template="Question 1: {question1}\nQuestion 2: {question2}\nQuestion: Do both questions ask the same thing?\nAnswer:",
                verbalizer="no-yes",
            ),
        }
    )
    verbalizers = {"no-yes": ("No", "Yes"), "no-yes-lower": ("no", "yes")}  # the latter as in lm-evaluation-harness
    in_domain = "qqp"
    out_of_domain = ("paws_qqp",)
    sources = (TRAIN, VALIDATION, PAWS)
    cut = True

    def load(self, data: DataRef) -> TaskData:
        columns = {"question1": "question1", "question2": "question2"}
        pool, validation = (
            labelled_examples(source.rows(data), name, columns, 2)
            for source, name in ((TRAIN, "qqp_train"), (VALIDATION, "qqp_validation"))
        )
        if self.cut:
            kept = original_subset([len(pool), len(validation)])
            pool, validation = (tuple(rows[i] for i in places) for rows, places in zip((pool, validation), kept, strict=True))
        tests = (TestSet(self.in_domain, "in", validation), TestSet("paws_qqp", "out", _paws(data)))
        return TaskData(pool, tests, revision=", ".join(source.origin(data) for source in (VALIDATION, PAWS)))


def _paws(data: DataRef) -> tuple[Example, ...]:
    rows = (without_literals(row, where) for _, where, row in numbered(PAWS.rows(data), "paws_qqp"))
    return labelled_examples(rows, "paws_qqp", {"question1": "sentence1", "question2": "sentence2"}, 2)


TASK = Qqp()
