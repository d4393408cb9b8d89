"""One trial: a model, a task, a method, shots and seeds in; a record out."""

__version__ = "0.1.0"
