"""Results folders for the tests of the analysis."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import Store, prediction_rows

from llmft.errors import Cause
from llmft.record import Finding


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr("llmft.files.os.fsync", lambda file: None)  # nothing here has to outlive a power cut
    return Store(tmp_path / "results")


@pytest.fixture
def full_store(store) -> Store:
    return fill(store)


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
                    failed=Cause.DIVERGED if broken else None, message="loss became NaN at step 12" if broken else "", predictions=prediction_rows(),
                )  # fmt: skip
    store.add(0, "zero_shot", 0.53, 0.5, n_shots=0)
    return store
