"""One trial from its spec to its record."""

from llmft.trial.cost import packages
from llmft.trial.export import export_adapter, export_model
from llmft.trial.forgetting import check_forgetting, measure, measure_base, pair, read_text, resolve_forgetting, zero_shot_spec
from llmft.trial.preparation import PreparedTrial, draw_for_trial, encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import check_spec, run_trial
from llmft.trial.weights import restored

__all__ = [
    "PreparedTrial", "check_forgetting", "check_spec", "draw_for_trial", "encode_prompts", "encode_teacher_prompts", "export_adapter",
    "export_model", "measure", "measure_base", "packages", "pair", "prepare_trial", "read_text", "resolve_forgetting", "restored",
    "run_trial", "zero_shot_spec",
]  # fmt: skip
