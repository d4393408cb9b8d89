"""The columns of the frame: their names, types and meaning, in the order in which they stand.

Every frame has all of these, whatever the records hold; what a record does not say is missing (NaN), never a sentinel.
Beside them each test set adds its own: `<set>_<metric>` for the metrics in `SET_METRICS`, and
`<set>_<group>_<value>_accuracy` for each value of each grouping (float64, all of them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class Column(NamedTuple):
    """One column. `dtype` is pandas' name of the type; `Int64` is the integer that can be missing."""

    name: str
    dtype: str
    description: str


SET_METRICS = (
    "n",
    "score",
    "accuracy",
    "macro_accuracy",
    "macro_f1",
    "mcc",
    "calibration_error",
    "loss",
    "full_vocabulary_accuracy",
    "non_label_share",
    "majority_share",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bleu",
    "exact_match",
    "token_f1",
)
"""What each test set contributes as `<set>_<metric>`; the units are those of `llmft.records.record.SetMetrics`."""

HEADLINE_METRICS = {
    "score": "the number that comparisons are about, [0, 1]; what it is stands in `metric`",
    "accuracy": "share right under the restricted rule, [0, 1]",
    "macro_accuracy": "mean recall over the labels, [0, 1]",
    "macro_f1": "mean F1 over the labels, [0, 1]",
    "mcc": "Matthews correlation, [-1, 1]",
    "majority": "accuracy of always giving the most frequent label, [0, 1]",
    "loss": "mean negative log-likelihood among the label words, nats",
    "full_vocabulary_accuracy": "share whose best word of all is the right label word, [0, 1]",
}

DOMAINS = {"in_domain": "in", "out_of_domain": "out"}
"""Prefix of the headline columns -> domain of the set they stand for: the first of that domain in the record."""


def _headline(prefix: str) -> tuple[Column, ...]:
    what = "the in-domain set" if prefix == "in_domain" else "the first out-of-domain set"
    return (
        Column(f"{prefix}_set", "str", f"name of {what}"),
        *(Column(f"{prefix}_{name}", "float64", f"{what}: {text}") for name, text in HEADLINE_METRICS.items()),
    )


COLUMNS: tuple[Column, ...] = (
    Column("digest", "str", "identity of the trial; the folder's name where the record is unreadable"),
    Column("stage", "str", "'report', 'search', or 'other' (in the store, but not in the sweep's manifest)"),
    Column("status", "str", "'finished', 'failed' or 'unreadable'"),
    Column("cause", "str", "why it failed: a value of llmft.errors.Cause"),
    Column("message", "str", "what went wrong"),
    Column("model", "str", "name of the model"),
    Column("task", "str", "name of the task"),
    Column("method", "str", "name of the method in the plan: its own, unless the plan renamed it"),
    Column("base_method", "str", "name of the method itself"),
    Column("n_shots", "Int64", "labelled examples, in the unit of shots_unit"),
    Column("shots_unit", "str", "'total' or 'per_class'"),
    Column("pattern", "str", "name of the pattern"),
    Column("verbalizer", "str", "name of the verbalizer"),
    Column("data_seed", "Int64", "seed of the drawn examples"),
    Column("order_seed", "Int64", "seed of the order of the examples"),
    Column("init_seed", "Int64", "seed of new weights"),
    Column("dropout_seed", "Int64", "seed of the dropout"),
    Column("learning_rate", "float64", "largest learning rate"),
    Column("epochs", "Int64", "passes over the shots"),
    Column("batch_size", "Int64", "examples per optimizer step"),
    Column("settings", "str", "the method's own hyper-parameters, JSON"),
    Column("train", "str", "how the weights are trained, all of it, JSON"),
    Column("precision", "str", "'fp32', 'bf16' or 'fp16'"),
    Column("n_dev", "Int64", "examples that select checkpoints and hyper-parameters"),
    Column("selection", "str", "which checkpoint: 'last', 'best_dev', an oracle, or 'none' (nothing trained, or no result)"),
    Column("is_oracle", "bool", "the selection looks at the reported sets"),
    Column("dev_score", "float64", "the metric on the dev examples, [0, 1]"),
    Column("teacher_dev_score", "float64", "the metric on the dev examples of the teacher that a distilled model learned from"),
    Column("teacher_last_dev_score", "float64", "the same of the teacher of the last round, which is the student if there are several"),
    Column("teacher_trusted_share", "float64", "share of the last teacher's answers that were trained towards, [0, 1]"),
    Column("dev_loss", "float64", "loss on the dev examples, nats"),
    Column("findings", "str", "codes of the findings, each once, joined by ';'; 'code@set' where a set is concerned"),
    Column("finding_details", "str", "the findings in full, a JSON list; empty where there are none"),
    Column("n_warnings", "Int64", "findings above a note"),
    Column("sets", "str", "the reported sets, JSON: name -> {domain, n, groups: grouping -> values}"),
    Column("metric", "str", "what the scores are: 'accuracy' for classification, 'rougeL' or 'token_f1' for generated text"),
    *_headline("in_domain"),
    *_headline("out_of_domain"),
    Column("gap", "float64", "in_domain_score minus out_of_domain_score"),
    Column("wall_s", "float64", "whole trial, seconds"),
    Column("train_s", "float64", "training, seconds"),
    Column("evaluate_s", "float64", "evaluation, seconds"),
    Column("device", "str", "device the trial ran on"),
    Column("n_workers", "Int64", "processes, with a device each, that ran the trial together"),
    Column("peak_memory_bytes", "Int64", "largest memory in use"),
    Column("tokens_trained", "Int64", "tokens seen in training"),
    Column("tokens_evaluated", "Int64", "tokens seen in evaluation"),
    Column("tokens_teacher", "Int64", "tokens that the teacher of a distillation read"),
    Column("n_parameters", "Int64", "parameters of the model, without what the method adds"),
    Column("n_trainable_parameters", "Int64", "parameters that were trained"),
    Column("stored_bytes", "Int64", "what is kept beside the base model"),
    Column("tokens_per_query", "float64", "mean length of a prompt, demonstrations included"),
    Column("flops", "float64", "estimated floating point operations"),
    Column("n_steps", "Int64", "optimizer steps"),
    Column("shots_hash", "str", "hash of the drawn shots"),
    Column("n_demonstrations", "Int64", "demonstrations in the prompt"),
    Column("n_demonstrations_dropped", "Int64", "demonstrations that did not fit"),
    Column("provenance", "str", "versions, revisions and device, JSON"),
    Column("command", "str", "the command that runs the trial again"),
)
"""The declared columns. `analysis.load` gives them first, in this order and with these types."""

DTYPES = {column.name: column.dtype for column in COLUMNS}


def typed_frame(rows: Sequence[Mapping[str, Any]], dtypes: Mapping[str, str]) -> pd.DataFrame:
    """Build a frame with exactly the columns of `dtypes` (name -> pandas type) from `rows`; absent values are missing."""
    import pandas as pd

    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=dtype) for name, dtype in dtypes.items()})


def trial_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Build a frame of trials: the declared columns first, then every other column of `rows` as float64 (those of the test sets)."""
    of_sets = dict.fromkeys((name for row in rows for name in row if name not in DTYPES), "float64")
    return typed_frame(rows, DTYPES | of_sets)
