"""A generated task whose answers are texts: say a sentence of the toy language again. Needs no data and no network.

Out of domain the sentences are those of the task `toy`'s out-of-domain set.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmft.prompts import Pattern
from llmft.spec import DataRef
from llmft.task import Example, GenerationTask, TaskData, TestSet
from llmft.tasks.toy import TASK as TOY
from llmft.toy.language import Pair, toy_data


def _examples(pairs: Iterable[Pair], name: str) -> tuple[Example, ...]:
    sentences = dict.fromkeys(pair.hypothesis for pair in pairs)  # each once
    return tuple(
        Example(f"{name}/{index}", {"sentence": sentence}, None, references=(sentence,))
        for index, sentence in enumerate(sentences)
    )


class ToyText(GenerationTask):
    patterns = {"minimal": Pattern("{sentence} ?")}
    metric = "rougeL"
    generation_defaults = {"max_new_tokens": 16}
    in_domain = "toy_text"
    out_of_domain = ("toy_text_hans",)
    needs_data = False

    def resolve_data(self, directory: str | None) -> DataRef:
        return TOY.resolve_data(directory)

    def load(self, data: DataRef) -> TaskData:
        rows = toy_data()
        pool = _examples(rows.train, "toy_text_train")
        known = {example.references for example in pool}
        tests = (
            TestSet("toy_text", "in", _examples(rows.in_domain, "toy_text")),
            TestSet("toy_text_hans", "out", _examples(rows.out_of_domain, "toy_text_hans")),
        )
        print(len(pool), [(len(t.examples), sum(e.references in known for e in t.examples)) for t in tests])
        return TaskData(pool, tests, revision="generated")


TASK = ToyText()
