"""A generated task whose answers are texts: say a sentence's first word twice. Needs no data and no network.

The sentences are the premises of the task `toy`, in and out of domain. A model must learn what to say and where to end; `exact_match`
tells whether it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmft.config import DataRef, Pattern
from llmft.data import Example, GenerationTask, TaskData, TestSet
from llmft.tasks._toy_language import Pair, toy_data
from llmft.tasks.toy import TASK as TOY


def _examples(pairs: Iterable[Pair], name: str) -> tuple[Example, ...]:
    sentences = [pair.premise for pair in pairs]
    return tuple(
        Example(f"{name}/{index}", {"sentence": sentence}, None, references=(" ".join(sentence.split()[:1] * 2),))
        for index, sentence in enumerate(sentences)
    )


class ToyText(GenerationTask):
    patterns = {"minimal": Pattern(template="{sentence} ?")}
    metric = "rougeL"
    generation_defaults = {"max_new_tokens": 8}
    in_domain = "toy_text"
    out_of_domain = ("toy_text_hans",)
    needs_data = False

    def resolve_data(self, directory: str | None) -> DataRef:
        return TOY.resolve_data(directory)

    def load(self, data: DataRef) -> TaskData:
        rows = toy_data()
        tests = (
            TestSet("toy_text", "in", _examples(rows.in_domain, "toy_text")),
            TestSet("toy_text_hans", "out", _examples(rows.out_of_domain, "toy_text_hans")),
        )
        return TaskData(_examples(rows.train, "toy_text_train"), tests, revision="generated")


TASK = ToyText()
