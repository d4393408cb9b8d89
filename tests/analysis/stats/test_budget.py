"""What the search cost and chose, and scores beside costs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import analysis
from analysis.frames.selection import choose
from analysis.stats.budget import budget_curves, costs, search_points
from analysis.stats.significance import expected_best
from llmft.errors import Cause

DEV = {1e-5: (0.5, 0.6), 1e-4: (0.7, 0.8), 1e-3: (0.9, None)}  # learning rate -> dev score on each search seed; None: failed


@pytest.fixture
def searched(store):
    """Three settings tried on two search seeds, and two report trials."""
    search = []
    for rate, scores in DEV.items():
        for seed, score in zip((100, 101), scores, strict=True):
            record = store.add(seed, "lora", learning_rate=rate, failed=Cause.DIVERGED if score is None else None)
            path = store.folder(record) / "record.json"
            content = json.loads(path.read_text())
            content["dev_score"] = {} if score is None else {"last": score, "best_dev": score}
            path.write_text(json.dumps(content))
            search.append(record.digest)
    report = [store.add(seed, "lora").digest for seed in range(2)]
    (store.root / "sweep.json").write_text(json.dumps({"report": report, "search": search}))
    return analysis.load(store.root)


def test_the_choice_is_the_best_mean_over_the_search_seeds(searched):
    row = choose(searched).iloc[0]
    assert row["learning_rate"] == 1e-4 and row["dev_score"] == pytest.approx(0.75)
    assert (row["n_seeds"], row["n_points"]) == (2, 3)  # a setting that failed once is tried, and never chosen


def test_the_budget_counts_settings_and_their_failures(searched):
    points = search_points(searched).set_index("learning_rate")
    assert points["dev_score"].to_dict() == pytest.approx({1e-5: 0.55, 1e-4: 0.75, 1e-3: 0.0})
    curve = budget_curves(searched)
    assert curve["n_trials"].tolist() == [1, 2, 3]
    assert curve["expected"].tolist() == pytest.approx(expected_best([0.55, 0.75, 0.0]).tolist())


def test_the_front_is_what_nothing_beats_on_both(full_store):
    table = costs(analysis.load(full_store.root))
    for cost in ("tokens_per_query", "device_hours"):
        for row in table.itertuples():
            here = table[(table["score"] >= row.score) & (table[cost] <= getattr(row, cost))]
            beaten = ((here["score"] > row.score) | (here[cost] < getattr(row, cost))).any()
            assert getattr(row, f"front_{cost}") == (not beaten)
    lora = analysis.load(full_store.root).query("method == 'lora' and n_shots == 16 and selection == 'best_dev'")
    cell = table.query("method == 'lora' and n_shots == 16").iloc[0]
    assert cell["device_hours"] == pytest.approx(lora["wall_s"].mean() / 3600) and np.isfinite(cell["score"])


def test_search_time_belongs_to_its_cell(searched):
    row = costs(searched).iloc[0]
    hours = searched[searched["stage"] == "search"].drop_duplicates("digest")["wall_s"].sum() / 3600
    assert row["search_hours"] == pytest.approx(hours) and hours > 0
