"""Turn one record into rows of the frame: plain dictionaries, column -> value."""

from __future__ import annotations

import json
from typing import Any

from analysis.frames.columns import DOMAINS, HEADLINE_METRICS, SET_METRICS
from analysis.frames.reproduce import trial_command
from llmft.config import ORACLES
from llmft.records import RecordError, SetMetrics, StoragePath, Teacher, TrialRecord, read_record
from llmft.seeds import SEED_FIELDS

LABEL = "label"
"""The grouping by gold label: the accuracy of a value is the recall of that label."""

_SPEC = ("task", "method", "n_shots", "shots_unit", "pattern", "verbalizer", "precision", "n_dev")
_TRAIN = ("learning_rate", "epochs", "batch_size")
_COST = (
    *("wall_s", "train_s", "evaluate_s", "device", "n_workers", "peak_memory_bytes"),
    *("tokens_trained", "tokens_evaluated", "tokens_teacher"),
    *("n_parameters", "n_trainable_parameters", "stored_bytes", "tokens_per_query", "flops", "n_steps"),
)


def read_rows(folder: StoragePath) -> list[dict[str, Any]]:
    """Read the rows of the trial in `folder`: one for each selection, one where there is none.

    A column that a row does not name is missing. A record that cannot be read is a row with `status` 'unreadable'.
    """
    try:
        record = read_record(folder)
    except (RecordError, OSError) as error:
        return [{"digest": folder.name, "status": "unreadable", "message": str(error), "selection": "none", "is_oracle": False}]
    trial = _trial(record)
    selections = list(record.metrics) if record.finished and record.metrics else ["none"]
    return [trial | _selected(record, selection) for selection in selections]


def _trial(record: TrialRecord) -> dict[str, Any]:
    """What holds for every selection of a trial."""
    spec, draws = record.spec, record.draws
    return {
        "digest": record.digest,
        "status": record.status,
        "cause": record.cause.value if record.cause else None,
        "message": record.message or None,
        "model": spec.model.name,
        **{name: getattr(spec, name) for name in (*_SPEC, *SEED_FIELDS)},
        **{name: getattr(spec.train, name) for name in _TRAIN},
        "settings": json.dumps(spec.settings, sort_keys=True),
        "train": spec.train.model_dump_json(),
        **({name: getattr(record.cost, name) for name in _COST} if record.cost else {}),
        "shots_hash": draws.shots_hash or None,
        **_teacher(record.teacher),
        "n_demonstrations": len(draws.demonstrations),
        "n_demonstrations_dropped": draws.n_demonstrations_dropped,
        "provenance": json.dumps(record.provenance, sort_keys=True) if record.provenance else None,
        "command": trial_command(spec),
    }


def _teacher(teacher: Teacher | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    last = teacher.rounds[-1] if teacher.rounds else None
    return {
        "teacher_dev_score": teacher.dev_score,
        "teacher_last_dev_score": last and last.dev_score,
        "teacher_trusted_share": last and last.n_trusted / last.n_asked,
    }


def _selected(record: TrialRecord, selection: str) -> dict[str, Any]:
    """What one selection of a trial adds."""
    sets = record.metrics.get(selection, {}) if record.finished else {}
    findings = [finding for finding in record.findings if not sets or finding.selection in (None, selection)]
    codes = dict.fromkeys(f"{finding.code}@{finding.set}" if finding.set else finding.code for finding in findings)
    row: dict[str, Any] = {
        "selection": selection,
        "is_oracle": selection in ORACLES,
        "dev_score": record.dev_score.get(selection),
        "dev_loss": record.dev_loss.get(selection),
        "findings": ";".join(codes) or None,
        "finding_details": json.dumps([finding.model_dump() for finding in findings]) if findings else None,
        "n_warnings": sum(finding.severity != "note" for finding in findings),
        "sets": json.dumps({name: _shape(numbers) for name, numbers in sets.items()}) if sets else None,
    }
    for name, numbers in sets.items():
        row |= {f"{name}_{metric}": getattr(numbers, metric) for metric in SET_METRICS}
        for group, values in _groups(numbers).items():
            row |= {f"{name}_{group}_{value}_accuracy": accuracy for value, accuracy in values.items()}
    for prefix, domain in DOMAINS.items():  # after the sets: these names are ours, whatever a set is called
        headline = next((name for name, numbers in sets.items() if numbers.domain == domain), None)
        row[f"{prefix}_set"] = headline
        for metric in HEADLINE_METRICS:
            field = "majority_share" if metric == "majority" else metric
            row[f"{prefix}_{metric}"] = getattr(sets[headline], field) if headline else None
    row["metric"] = next((numbers.metric for numbers in sets.values()), None)
    if row["in_domain_score"] is not None and row["out_of_domain_score"] is not None:
        row["gap"] = row["in_domain_score"] - row["out_of_domain_score"]
    return row


def _shape(numbers: SetMetrics) -> dict[str, Any]:
    return {
        "domain": numbers.domain,
        "n": numbers.n,
        "groups": {group: list(values) for group, values in _groups(numbers).items()},
    }


def _groups(numbers: SetMetrics) -> dict[str, dict[str, float]]:
    """Grouping -> value -> accuracy: the set's own groupings, and the labels."""
    return numbers.group_accuracy | ({LABEL: numbers.label_accuracy} if numbers.label_accuracy else {})
