"""Dialogues and their summaries: what the tasks `samsum` and `dialogsum` share. Each is the other's out-of-domain set."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llmft.config import DataRef, Pattern
from llmft.data import Example, GenerationTask, Source, TaskData, TestSet, checked_fields, checked_references, numbered

CONVERTED = "refs/convert/parquet"  # both lie on the hub as csv files
HOLDS = "dialogue, summary (or summaries, a list of texts)"
TRAIN = {
    "samsum": Source(("samsum_train.parquet",), ("knkarthick/samsum", None, "train", CONVERTED), holds=HOLDS),
    "dialogsum": Source(("dialogsum_train.parquet",), ("knkarthick/dialogsum", None, "train", CONVERTED), holds=HOLDS),
}
TEST = {
    "samsum": Source(("samsum_test.parquet",), ("knkarthick/samsum", None, "test", CONVERTED), holds=HOLDS),
    "dialogsum": Source(("dialogsum_test.parquet",), ("knkarthick/dialogsum", None, "test", CONVERTED), holds=HOLDS),
}
DIALOGUE_PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        "minimal": Pattern(template="{dialogue}\nSummary:"),
        "tl;dr": Pattern(template="{dialogue}\nTL;DR:"),  # Radford et al. 2019, section 3.6
        "longbench": Pattern(  # Bai et al. 2023, the prompt for SAMSum
            template="Summarize the dialogue into a few short sentences.\nDialogue: {dialogue}\nSummary:"
        ),
    }
)


def dialogues(source: Source, data: DataRef, name: str) -> tuple[Example, ...]:
    """Every dialogue with its references: the rows' `summaries`, or the `summary` of each of the successive rows that hold it.

    (DialogSum's test set has three references, on the hub in three rows. One row of SAMSum's train set has no dialogue.)
    """
    examples: list[Example] = []
    for id_, where, row in numbered(source.rows(data), name):
        if not row.get("dialogue"):
            continue
        fields = checked_fields(row, {"dialogue": "dialogue"}, where)
        fields = {"dialogue": fields["dialogue"].replace("\r\n", "\n").strip()}
        references = checked_references(row.get("summaries") or row.get("summary"), where)
        if examples and examples[-1].fields == fields:
            last = examples.pop()
            id_, references = last.id, last.references + references
        examples.append(Example(id_, fields, None, references=references))
    return tuple(examples)


class DialogueTask(GenerationTask):
    """A data set of summarised dialogues, with another one out of domain."""

    patterns = DIALOGUE_PATTERNS
    metric = "rougeL"
    generation_defaults = {"max_new_tokens": 64}

    @property
    def sources(self) -> tuple[Source, ...]:
        return TRAIN[self.in_domain], TEST[self.in_domain], TEST[self.out_of_domain[0]]

    def load(self, data: DataRef) -> TaskData:
        tests = tuple(
            TestSet(name, domain, dialogues(TEST[name], data, f"{name}_test"))
            for name, domain in ((self.in_domain, "in"), (self.out_of_domain[0], "out"))
        )
        name = self.in_domain
        return TaskData(dialogues(TRAIN[name], data, f"{name}_train"), tests, revision=TEST[name].origin(data))
