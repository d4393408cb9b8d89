"""Records as a sweep would leave them, written through `llmft.records.record_files` itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmft.config.spec import ModelRef, TrainSpec, TrialSpec
from llmft.errors import Cause
from llmft.records.record import Cost, Draws, Finding, SetMetrics, TrialRecord
from llmft.records.record_files import write_record

HEURISTICS = ("lexical_overlap", "subsequence", "constituent")


def set_metrics(
    accuracy: float, domain: str = "in", majority: float = 0.527, n: int = 277, groups: dict | None = None, **others
) -> SetMetrics:
    values = {
        "n": n,
        "score": accuracy,
        "accuracy": accuracy,
        "macro_accuracy": accuracy - 0.01,
        "macro_f1": accuracy - 0.02,
        "mcc": 2 * accuracy - 1,
        "calibration_error": 0.1,
        "loss": 0.69,
        "full_vocabulary_accuracy": accuracy / 2,
        "non_label_share": 0.25,
        "majority_share": majority,
        "label_shares": {"entailment": majority, "not_entailment": 1 - majority},
        "predicted_shares": {"entailment": 0.5, "not_entailment": 0.5},
        "label_accuracy": {"entailment": accuracy, "not_entailment": accuracy},
        "group_accuracy": groups or {},
        "domain": domain,
    }
    return SetMetrics(**values | others)


def prediction_rows(n: int = 40) -> bytes:
    generator = np.random.default_rng(0)
    scores = np.log(generator.dirichlet([1, 1], size=n))
    table = pa.table(
        {
            "selection": ["best_dev"] * n,
            "set": ["rte"] * (n // 2) + ["hans"] * (n - n // 2),
            "id": [f"test/{i}" for i in range(n)],
            "label": [i % 2 for i in range(n)],
            "prediction": scores.argmax(1).tolist(),
            "free_prediction": [None] * n,
            "label_log_probabilities": scores.tolist(),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


class Store:
    """A results folder that trials are put into."""

    def __init__(self, root: Path):
        self.root = root

    def add(
        self,
        seed: int = 0,
        method: str = "fine_tuning",
        accuracy: float | None = 0.6,
        out_accuracy: float | None = 0.55,
        *,
        model: str = "opt-125m",
        n_shots: int = 16,
        pattern: str = "minimal",
        selections: tuple[str, ...] = ("last", "best_dev"),
        failed: Cause | None = None,
        message: str = "",
        findings: list[Finding] | None = None,
        shots_hash: str | None = None,
        predictions: bytes | None = None,
        sets: dict[str, SetMetrics] | None = None,
        learning_rate: float = 1e-5,
        train: dict | None = None,
        provenance: dict | None = None,
        seeds: dict[str, int] | None = None,
        **spec,
    ) -> TrialRecord:
        trained = method not in ("in_context", "zero_shot")
        described = TrialSpec(
            model=ModelRef(name=model), task=spec.pop("task", "rte"), method=method, n_shots=n_shots, pattern=pattern,
            train=TrainSpec(learning_rate=learning_rate, **(train or {})), **spec,
        ).with_seed(seed).model_copy(update=seeds or {})  # fmt: skip
        if sets is None:
            groups = {"heuristic": {name: (out_accuracy or 0) + shift for name, shift in zip(HEURISTICS, (-0.1, 0, 0.1), strict=True)}}
            sets = {} if accuracy is None else {"rte": set_metrics(accuracy)}
            if out_accuracy is not None:
                sets["hans"] = set_metrics(out_accuracy, "out", 0.5, 3000, groups)
        shift = {"last": -0.02}  # the last checkpoint is two points worse than the selected one
        names = selections if trained else ("none",)
        metrics = {
            name: {
                key: value.model_copy(update=dict.fromkeys(("score", "accuracy"), value.accuracy + shift.get(name, 0.0)))
                for key, value in sets.items()
            }
            for name in names
        }
        drawn = [f"train/{seed}-{i}" for i in range(n_shots)]
        record = TrialRecord(
            digest=described.digest,
            spec=described,
            status="failed" if failed else "finished",
            cause=failed,
            message=message,
            metrics={} if failed else metrics,
            dev_score=dict.fromkeys(names, 0.625),
            dev_loss=dict.fromkeys(names, 0.6),
            findings=findings or [],
            draws=Draws(
                shots=drawn,
                demonstrations=drawn if method == "in_context" else [],
                shots_hash=shots_hash or (f"hash{seed}" if drawn else ""),
            ),
            cost=None
            if failed
            else Cost(wall_s=10 + seed, train_s=6, evaluate_s=3, n_trainable_parameters=125_000, tokens_per_query=80.5, n_steps=40),
            provenance={"packages": {"torch": "2.9.0"}, "code": "abc123"} if provenance is None else provenance,
        )
        write_record(self.root / "trials" / record.digest, record, predictions)
        return record

    def folder(self, record: TrialRecord) -> Path:
        return self.root / "trials" / record.digest


def fill(store: Store) -> Store:
    """Four methods, two numbers of shots, one failure, one suspicious cell, a zero-shot row."""
    generator = np.random.default_rng(1)
    constant = Finding(
        code="constant_prediction", severity="warning", message="every answer is entailment", set="hans", selection="best_dev"
    )
    truncated = Finding(code="demonstrations_dropped", severity="note", message="2 of 32 demonstrations dropped")
    levels = {"fine_tuning": (0.66, 0.58), "lora": (0.645, 0.60), "in_context": (0.58, 0.53), "bitfit": (0.62, 0.55)}
    for n_shots in (16, 128):
        for method, (inside, outside) in levels.items():
            for seed in range(6):
                bonus = 0.06 * (n_shots == 128)
                noise = generator.normal(0, 0.02, 2)
                broken = method == "bitfit" and n_shots == 128 and seed == 2
                findings = [constant] if method == "bitfit" and seed < 3 else [truncated] if method == "in_context" else []
                store.add(
                    seed, method, inside + bonus + noise[0], outside + bonus / 2 + noise[1], n_shots=n_shots, findings=findings,
                    failed=Cause.DIVERGED if broken else None, message="loss became NaN at step 12" if broken else "",
                    predictions=prediction_rows(),
                )  # fmt: skip
    store.add(0, "zero_shot", 0.53, 0.5, n_shots=0)
    return store
