"""Results folders for the tests of the analysis."""

from __future__ import annotations

import pytest
from support.synthetic import Store, fill


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr("llmft.records.storage.os.fsync", lambda file: None)  # nothing here has to outlive a power cut
    return Store(tmp_path / "results")


@pytest.fixture
def full_store(store) -> Store:
    return fill(store)
