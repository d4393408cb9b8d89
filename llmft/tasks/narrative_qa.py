"""NarrativeQA (Kocisky et al. 2018): questions about books and films, answered from their summaries; two references each.

Test is the validation split (3,461 questions on 115 stories); shots come from train, whose stories are others. There is no
out-of-domain set. A local folder holds `narrativeqa_train.parquet` and `narrativeqa_validation.parquet`, with the columns summary,
question and answers.
"""

from __future__ import annotations

from typing import Any

from llmft.config import DataRef, Pattern
from llmft.data import Example, GenerationTask, Source, TaskData, TestSet, checked_fields, checked_references, numbered

HUB = "deepmind/narrativeqa"
COLUMNS = ("document.summary.text", "question.text", "answers")  # without the books
HOLDS = "summary, question, answers (a list of texts)"
TRAIN = Source(("narrativeqa_train.parquet",), (HUB, None, "train", "main"), hub_columns=COLUMNS, holds=HOLDS)
VALIDATION = Source(("narrativeqa_validation.parquet",), (HUB, None, "validation", "main"), hub_columns=COLUMNS, holds=HOLDS)
ASKED = "Answer the question as concisely as you can, using a single phrase if possible. Do not provide any explanation."


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's, with the column names of the local files."""
    answers = [answer["text"] for answer in row["answers"]]
    return {"summary": row["document"]["summary"]["text"], "question": row["question"]["text"], "answers": answers}


def _examples(source: Source, data: DataRef, name: str) -> tuple[Example, ...]:
    examples = []
    for id_, where, row in numbered(source.rows(data), name):
        if "document" in row:
            row = _flat(row)
        fields = checked_fields(row, {"summary": "summary", "question": "question"}, where)
        fields = {field: text.strip() for field, text in fields.items()}
        examples.append(Example(id_, fields, None, references=checked_references(row.get("answers"), where)))
    return tuple(examples)


class NarrativeQa(GenerationTask):
    patterns = {
        "minimal": Pattern(template="{summary}\nQuestion: {question}\nAnswer:"),
        "longbench": Pattern(  # Bai et al. 2023, there with the whole story
            template=f"You are given a story, which can be either a novel or a movie script, and a question. {ASKED}\n\nStory: {{summary}}"
            f"\n\nNow, answer the question based on the story.\n\nQuestion: {{question}}\n\nAnswer:"
        ),
    }
    metric = "token_f1"
    generation_defaults = {"max_new_tokens": 32}
    in_domain = "narrative_qa"
    sources = (TRAIN, VALIDATION)

    def load(self, data: DataRef) -> TaskData:
        test = TestSet("narrative_qa", "in", _examples(VALIDATION, data, "narrativeqa_validation"))
        return TaskData(_examples(TRAIN, data, "narrativeqa_train"), (test,), revision=VALIDATION.origin(data))


TASK = NarrativeQa()
