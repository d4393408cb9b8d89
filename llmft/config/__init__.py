"""What a user may write: specs, patterns and custom tasks, frozen and strict."""

from llmft.config.base import StrictModel
from llmft.config.custom_task import EXAMPLE_METRICS, ROUGE, CustomTask, Table, TaskEntry, definition_keys, label_text
from llmft.config.patterns import Pattern, render_prefix, with_literals
from llmft.config.spec import (
    ORACLES,
    DataRef,
    FileRef,
    ForgettingSpec,
    GenerationSpec,
    ModelRef,
    Selection,
    TaskRef,
    TrainSpec,
    TrialSpec,
    pattern_of,
)

__all__ = [
    "CustomTask", "DataRef", "EXAMPLE_METRICS", "FileRef", "ForgettingSpec", "GenerationSpec", "ModelRef", "ORACLES", "Pattern",
    "ROUGE", "Selection", "StrictModel", "Table", "TaskEntry", "TaskRef", "TrainSpec", "TrialSpec", "definition_keys", "label_text",
    "pattern_of", "render_prefix", "with_literals",
]  # fmt: skip
