"""Patterns and label words that the tasks of natural language inference share."""

from __future__ import annotations

from collections.abc import Mapping

from llmft.config import Pattern, with_literals

NLI_PATTERNS: Mapping[str, Pattern] = with_literals(
    {  # Mosbach et al. 2023, Table 5, with real newlines
        "minimal": Pattern(template="{premise} {hypothesis} ?", verbalizer="yes-no"),
        "gpt-3": Pattern(template="{premise} question: {hypothesis} Yes or No? answer:", verbalizer="yes-no"),
        "eval-harness": Pattern(template="{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", verbalizer="true-false"),
    }
)
NLI_VERBALIZERS: Mapping[str, tuple[str, ...]] = {"yes-no": ("Yes", "No"), "true-false": ("True", "False")}
