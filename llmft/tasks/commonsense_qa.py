"""CommonsenseQA (Talmor et al. 2019): which of five answers is right, told by its letter.

Test is the validation split (1,221 questions), since the test split's answers are not public; shots come from train (9,741). There
is no out-of-domain set. The pattern `eval-harness` is lm-evaluation-harness's `commonsense_qa`.
"""

from __future__ import annotations

from llmft.config import DataRef, Pattern
from llmft.data import Example, Source, Task, TaskData, TestSet, checked_fields, numbered
from llmft.errors import UserError

HUB = "tau/commonsense_qa"
HOLDS = "question, choices {label, text} (or choice_labels and choice_texts), answerKey (A to E)"
TRAIN = Source(("commonsenseqa_train.parquet", "train.parquet"), (HUB, None, "train", "main"), holds=HOLDS)
VALIDATION = Source(("commonsenseqa_validation.parquet", "validation.parquet"), (HUB, None, "validation", "main"), holds=HOLDS)
LETTERS = ("A", "B", "C", "D", "E")
CHOICES = "".join(f"\n{letter}. {{{letter}}}" for letter in LETTERS)


def _examples(source: Source, data: DataRef, name: str) -> tuple[Example, ...]:
    examples = []
    for id_, where, row in numbered(source.rows(data), name):
        choices = row.get("choices") or {"label": row.get("choice_labels"), "text": row.get("choice_texts")}
        letters, texts, answer = choices["label"], choices["text"], row.get("answerKey")
        if letters != list(LETTERS) or not isinstance(texts, list) or len(texts) != len(LETTERS) or answer not in LETTERS:
            raise UserError(
                f"{where}: choices {letters!r} and answer {answer!r} are not of {', '.join(LETTERS)}. Correct the row or leave it out."
            )
        fields = checked_fields(
            row | dict(zip(LETTERS, texts, strict=True)),
            {"question": "question"} | {letter: letter for letter in LETTERS},
            where,
        )
        examples.append(Example(id_, fields | {"question": fields["question"].strip()}, LETTERS.index(answer)))
    return tuple(examples)


class CommonsenseQa(Task):
    labels = LETTERS
    patterns = {
        "minimal": Pattern(template="{question}" + CHOICES + "\nAnswer:", verbalizer="letters"),
        "eval-harness": Pattern(template="Question: {question}" + CHOICES + "\nAnswer:", verbalizer="letters"),
    }
    verbalizers = {"letters": LETTERS}
    in_domain = "commonsense_qa"
    sources = (TRAIN, VALIDATION)

    def load(self, data: DataRef) -> TaskData:
        test = TestSet("commonsense_qa", "in", _examples(VALIDATION, data, "commonsenseqa_validation"))
        return TaskData(_examples(TRAIN, data, "commonsenseqa_train"), (test,), revision=VALIDATION.origin(data))


TASK = CommonsenseQa()
