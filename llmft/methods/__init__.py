"""One file a method; the folder is the registry. Importing it needs no torch."""

from llmft.methods._base import Method, SearchRange
from llmft.methods._recipe import Distillation, Rationales, Recipe, TaskMixture, TrialContext
from llmft.methods._registry import METHODS, build_method, check_kinds, complete_settings, method_class

__all__ = [
    "Distillation", "METHODS", "Method", "Rationales", "Recipe", "SearchRange", "TaskMixture", "TrialContext", "build_method",
    "check_kinds", "complete_settings", "method_class",
]  # fmt: skip
