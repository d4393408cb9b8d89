"""One file a method; the folder is the registry. Importing it needs no torch."""

from llmft.methods._base import Method, SearchRange, TeacherPrompt
from llmft.methods._registry import METHODS, build_method, check_kinds, complete_settings, method_class

__all__ = ["METHODS", "Method", "SearchRange", "TeacherPrompt", "build_method", "check_kinds", "complete_settings", "method_class"]
