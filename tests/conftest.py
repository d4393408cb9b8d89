from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> str:
    """The folder with RTE and HANS; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLMFT_TEST_DATA", ROOT.parent / "shared" / "data"))
    for name in ("rte_train.parquet", "rte_validation.parquet", "hans_regenerated.parquet"):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}: set LLMFT_TEST_DATA to a folder that holds it")
    return str(folder)
