"""From what a trial did to what it leaves: a record, a table of predictions, weights."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llmft.config import Selection, TrialSpec
from llmft.data import Draw
from llmft.errors import Cause
from llmft.evaluation import (
    Generated,
    Predictions,
    bias_findings,
    contamination_findings,
    coverage_findings,
    example_scores,
    mixture_findings,
    overlap_findings,
    patience_findings,
    prompt_findings,
    rationale_findings,
    set_findings,
    set_metrics,
    teacher_findings,
    text_findings,
    training_findings,
    word_findings,
)
from llmft.prompting import EncodedTrial
from llmft.records import Cost, Draws, Finding, Mixed, SetMetrics, Teacher, TrialRecord
from llmft.runtime import Runtime
from llmft.training import TrainingResult
from llmft.trial.cost import packages
from llmft.trial.preparation import PreparedTrial


@dataclass(frozen=True)
class TrialResult:
    """A record and, for a finished trial, its per-example predictions as a parquet file's bytes.

    `weights` are the trained tensors of the checkpoint that is best on dev, where that is selected, else of the last, as a
    safetensors file's bytes (`llmft.trial.weights`); None where they were not asked for, where nothing is trained, and in every process
    of a group but the first. `responses` are the texts that a teacher gave, as a parquet file's bytes; None where it gave none.
    """

    record: TrialRecord
    predictions: bytes | None = None
    weights: bytes | None = None
    responses: bytes | None = None


Metrics = dict[Selection, dict[str, SetMetrics]]


def finished_record(
    spec: TrialSpec, trial: PreparedTrial, encoded: EncodedTrial, result: TrainingResult, cost: Cost, teacher: Teacher | None
) -> TrialRecord:
    """Build the record of a trial that came to its end."""
    metrics: Metrics = {
        selection: {
            test.name: set_metrics(checkpoint.predictions[test.name], test.examples, trial.task.labels, test.domain) for test in trial.tests
        }
        for selection, checkpoint in result.checkpoints.items()
    }
    content_free = dict(zip(trial.task.labels, result.content_free or (), strict=bool(result.content_free)))
    findings = [
        *_prompt_findings(spec, trial, encoded),
        *(teacher_findings(teacher, len(trial.task.labels), len(trial.draw.dev)) if teacher else []),
        *_training_findings(spec, trial, result),
        *bias_findings(content_free),
        *coverage_findings(trial.tests, trial.data),
        *_prediction_findings(trial, encoded, result, metrics),
    ]
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="finished",
        metrics=metrics,
        **_progress(result, result.checkpoints),
        findings=findings,
        draws=_draws(trial.draw, encoded),
        weight_distance=result.weight_distance,
        virtual_tokens=result.virtual_tokens,
        content_free=content_free,
        teacher=teacher,
        mixture=[
            Mixed(task=part.task, pattern=part.pattern_name, n_pool=part.n_pool, rate=part.rate, n=len(part.examples))
            for part in trial.mixture
        ],
        cost=cost,
        provenance={
            "packages": packages(),
            "data_revision": trial.data.revision,
            **({"label_tokens": [list(ids) for ids in trial.words.ids]} if trial.words else {}),
        },
    )


def _prompt_findings(spec: TrialSpec, trial: PreparedTrial, encoded: EncodedTrial) -> list[Finding]:
    """What is suspicious before any training: label words, prompts, and texts that the model or two sets have in common."""
    draw = trial.draw
    return [
        *(word_findings(trial.words) if trial.words else []),
        *prompt_findings(encoded, len(trial.recipe.prompting.demonstrations)),
        *contamination_findings([spec.model.name, trial.model_info.tuned_from], [spec.task, *(test.name for test in trial.tests)]),
        *overlap_findings(draw.shots + draw.dev + draw.unlabelled, trial.data),
        *(finding for part in trial.mixture for finding in mixture_findings(part.task, part.examples, trial.data)),
    ]


def _training_findings(spec: TrialSpec, trial: PreparedTrial, result: TrainingResult) -> list[Finding]:
    if not trial.method.trains:
        return []
    return [
        *training_findings(result.first_loss, result.last_loss, result.n_steps, result.n_skipped_steps),
        *patience_findings(result.curve, spec.train.patience),
    ]


def _prediction_findings(trial: PreparedTrial, encoded: EncodedTrial, result: TrainingResult, metrics: Metrics) -> list[Finding]:
    """What is suspicious about the predictions of each selected checkpoint on each test set."""
    findings: list[Finding] = []
    for selection, checkpoint in result.checkpoints.items():
        for test in trial.tests:
            predictions, numbers = checkpoint.predictions[test.name], metrics[selection][test.name]
            if isinstance(predictions, Generated):
                findings += text_findings(numbers, predictions.texts, encoded.demonstrations, test.examples, test.name, selection)
            else:
                findings += set_findings(numbers, test.name, selection)
                findings += rationale_findings(predictions.reached, test.name, selection)
    return findings


def _draws(draw: Draw, encoded: EncodedTrial) -> Draws:
    ids = [example.id for example in draw.shots]
    return Draws(
        shots=ids,
        dev=[example.id for example in draw.dev],
        unlabelled=[example.id for example in draw.unlabelled],
        demonstrations=[example.id for example in encoded.demonstrations],
        n_demonstrations_dropped=encoded.n_dropped,
        shots_hash=hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16] if ids else "",
    )


def failed_record(spec: TrialSpec, runtime: Runtime, wall_s: float, result: TrainingResult, cause: Cause, message: str) -> TrialRecord:
    """Build the record of a trial that failed, with what was known until then."""
    provenance: dict[str, Any] = {"packages": packages()}
    if cause is Cause.PRUNED:
        provenance["stop_below"] = {str(epoch): accuracy for epoch, accuracy in runtime.stop_below.items()}
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="failed",
        cause=cause,
        message=message[:2000],
        **_progress(result, spec.selections),
        cost=Cost(
            wall_s=wall_s,
            tokens_trained=result.n_tokens,
            n_steps=result.n_steps,
            n_workers=runtime.world_size,
            micro_batch_tokens=runtime.micro_batch_tokens,
            n_out_of_memory=runtime.n_out_of_memory,
        ),
        provenance=provenance,
    )


def _progress(result: TrainingResult, selections: Collection[Selection]) -> dict[str, Any]:
    """The fields of a record that a training fills as it goes on."""
    chosen = {name: checkpoint for name, checkpoint in result.checkpoints.items() if name in selections}
    return {
        "dev_score": {name: c.dev_score for name, c in chosen.items() if c.dev_score is not None},
        "dev_loss": {name: c.dev_loss for name, c in chosen.items() if c.dev_loss is not None},
        "selected_step": {name: c.step for name, c in chosen.items()},
        "curve": result.curve,
    }


def predictions_file(trial: PreparedTrial, result: TrainingResult) -> bytes | None:
    """Write one row per selection, set and example: gold and predicted label and the log-probability of every label; or the generated
    text, whether it came to its end, and its scores. Where rationales were generated, these too, and whether they came to the marker."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not trial.tests:
        return None
    tables = []
    for selection, checkpoint in result.checkpoints.items():
        for test in trial.tests:
            n = len(test.examples)
            columns = {
                "selection": pa.array([selection] * n).dictionary_encode(),
                "set": pa.array([test.name] * n).dictionary_encode(),
                "id": [example.id for example in test.examples],
            }
            tables.append(pa.table(columns | _prediction_columns(checkpoint.predictions[test.name])))
    buffer = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables).unify_dictionaries(), buffer, compression="zstd")
    return buffer.getvalue()


def _prediction_columns(predictions: Predictions | Generated) -> dict[str, Any]:
    import pyarrow as pa

    if isinstance(predictions, Generated):
        scores = example_scores(predictions.texts, predictions.references)
        return {"text": predictions.texts, "finished": predictions.finished} | scores
    free = predictions.free
    columns: dict[str, Any] = {
        "label": pa.array(predictions.labels, pa.int16()),
        "prediction": pa.array(predictions.predicted, pa.int16()),
        "free_prediction": pa.nulls(len(predictions.labels), pa.int16()) if free is None else pa.array(free, pa.int16()),
        "label_log_probabilities": pa.array(list(predictions.log_probabilities), pa.list_(pa.float32())),
    }
    if predictions.rationales:
        columns |= {"rationale": predictions.rationales, "marker_reached": predictions.reached}
    return columns
