"""The task framework: rows become examples, and examples are drawn as shots, dev and test sets."""

from llmft.data.custom import TableTask, complete
from llmft.data.rows import checked_fields, checked_label, checked_references, labelled_examples, numbered
from llmft.data.sampling import Draw, DrawRequest, draw_examples, draw_unlabelled, subsample
from llmft.data.sources import Source
from llmft.data.task import NO_LABEL, Example, GenerationTask, Kind, Task, TaskData, TestSet

__all__ = [
    "Draw", "DrawRequest", "Example", "GenerationTask", "Kind", "NO_LABEL", "Source", "TableTask", "Task", "TaskData", "TestSet",
    "checked_fields", "checked_label", "checked_references", "complete", "draw_examples", "draw_unlabelled", "labelled_examples",
    "numbered", "subsample",
]  # fmt: skip
