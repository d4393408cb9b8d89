"""From what a trial did to what it leaves: a record, a table of predictions, weights."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llmft.config import Selection, TrialSpec
from llmft.errors import Cause
from llmft.evaluation import (
    Generated,
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
from llmft.records import Cost, Draws, Mixed, Teacher, TrialRecord
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


def finished_record(
    spec: TrialSpec, setting: PreparedTrial, encoded: EncodedTrial, result: TrainingResult, spent: Cost, teacher: Teacher | None
) -> TrialRecord:
    """The record of a trial that came to its end."""
    labels, tests = setting.task.labels, {test.name: test.examples for test in setting.tests}
    metrics = {
        selection: {test.name: set_metrics(checkpoint.predictions[test.name], test.examples, labels, test.domain) for test in setting.tests}
        for selection, checkpoint in result.checkpoints.items()
    }
    found = word_findings(setting.words) if setting.words else []
    found += prompt_findings(encoded, len(setting.method.context(setting.draw.shots)))
    sets = [spec.task, *(test.name for test in setting.tests)]
    found += contamination_findings([spec.model.name, setting.tuned_from], sets)
    found += overlap_findings(setting.draw.shots + setting.draw.dev + setting.draw.unlabelled, setting.data)
    for part in setting.mixture:
        found += mixture_findings(part.task, part.examples, setting.data)
    if teacher:
        found += teacher_findings(teacher, len(labels), len(setting.draw.dev))
    if setting.method.trains:
        found += training_findings(result.first_loss, result.last_loss, result.n_steps, result.n_skipped_steps)
        found += patience_findings(result.curve, spec.train.patience)
    content_free = dict(zip(labels, result.content_free or (), strict=bool(result.content_free)))
    found += bias_findings(content_free)
    found += coverage_findings(setting.tests, setting.data)
    for selection, by_set in metrics.items():
        for name, numbers in by_set.items():
            if setting.words:
                found += set_findings(numbers, name, selection)
                found += rationale_findings(result.checkpoints[selection].predictions[name].reached, name, selection)
            else:
                texts = result.checkpoints[selection].predictions[name].texts
                found += text_findings(numbers, texts, encoded.demonstrations, tests[name], name, selection)
    ids = [example.id for example in setting.draw.shots]
    draws = Draws(
        shots=ids,
        dev=[example.id for example in setting.draw.dev],
        unlabelled=[example.id for example in setting.draw.unlabelled],
        demonstrations=[example.id for example in encoded.demonstrations],
        n_demonstrations_dropped=encoded.n_dropped,
        shots_hash=hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16] if ids else "",
    )
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="finished",
        metrics=metrics,
        **_progress(result, result.checkpoints),
        findings=found,
        draws=draws,
        weight_distance=result.weight_distance,
        virtual_tokens=result.virtual_tokens,
        content_free=content_free,
        teacher=teacher,
        mixture=[
            Mixed(task=part.task, pattern=part.pattern_name, n_pool=part.n_pool, rate=part.rate, n=len(part.examples))
            for part in setting.mixture
        ],
        cost=spent,
        provenance={
            "packages": packages(),
            "data_revision": setting.data.revision,
            **({"label_tokens": [list(i) for i in setting.words.ids]} if setting.words else {}),
        },
    )


def failed_record(spec: TrialSpec, runtime: Runtime, wall_s: float, result: TrainingResult, cause: Cause, message: str) -> TrialRecord:
    """The record of a trial that failed, with what was known until then."""
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


def predictions_file(setting: PreparedTrial, result: TrainingResult) -> bytes | None:
    """One row per selection, set and example: gold and predicted label and the log-probability of every label; or the generated
    text, whether it came to its end, and its scores. Where rationales were said, these too, and whether they came to the marker."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not setting.tests:
        return None
    tables = []
    for selection, checkpoint in result.checkpoints.items():
        for test in setting.tests:
            n, predictions = len(test.examples), checkpoint.predictions[test.name]
            columns = {
                "selection": pa.array([selection] * n).dictionary_encode(),
                "set": pa.array([test.name] * n).dictionary_encode(),
                "id": [example.id for example in test.examples],
            }
            if isinstance(predictions, Generated):
                columns |= {"text": predictions.texts, "finished": predictions.finished}
                columns |= example_scores(predictions.texts, predictions.references)
            else:
                free = predictions.free
                columns |= {
                    "label": pa.array(predictions.labels, pa.int16()),
                    "prediction": pa.array(predictions.predicted, pa.int16()),
                    "free_prediction": pa.nulls(n, pa.int16()) if free is None else pa.array(free, pa.int16()),
                    "label_log_probabilities": pa.array(list(predictions.log_probabilities), pa.list_(pa.float32())),
                }
                if predictions.rationales:
                    columns |= {"rationale": predictions.rationales, "marker_reached": predictions.reached}
            tables.append(pa.table(columns))
    buffer = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables).unify_dictionaries(), buffer, compression="zstd")
    return buffer.getvalue()
