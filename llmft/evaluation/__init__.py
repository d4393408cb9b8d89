"""Predictions, metrics, findings, perplexity and the lm-evaluation-harness."""

from llmft.evaluation.contamination import contamination_findings
from llmft.evaluation.evaluator import Evaluator
from llmft.evaluation.findings import (
    bias_findings,
    coverage_findings,
    mixture_findings,
    overlap_findings,
    patience_findings,
    prompt_findings,
    rationale_findings,
    set_findings,
    teacher_findings,
    text_findings,
    training_findings,
    word_findings,
)
from llmft.evaluation.lm_eval import check_lm_eval, measures, resolve_folder, run_lm_eval
from llmft.evaluation.metrics import set_metrics
from llmft.evaluation.perplexity import UNBOUNDED, text_likelihood
from llmft.evaluation.predictions import Generated, Predictions
from llmft.evaluation.text_metrics import example_scores

__all__ = [
    "Evaluator", "Generated", "Predictions", "UNBOUNDED", "bias_findings", "check_lm_eval", "contamination_findings",
    "coverage_findings", "example_scores", "measures", "mixture_findings", "overlap_findings", "patience_findings", "prompt_findings",
    "rationale_findings", "resolve_folder", "run_lm_eval", "set_findings", "set_metrics", "teacher_findings", "text_findings",
    "text_likelihood", "training_findings", "word_findings",
]  # fmt: skip
