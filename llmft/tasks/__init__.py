"""One file a task; the folder is the registry."""

from llmft.tasks._nli import NLI_PATTERNS, NLI_VERBALIZERS
from llmft.tasks._registry import TASKS, load_data, load_task
from llmft.tasks._toy_language import Pair, in_domain_pair, toy_data

__all__ = ["NLI_PATTERNS", "NLI_VERBALIZERS", "Pair", "TASKS", "in_domain_pair", "load_data", "load_task", "toy_data"]
