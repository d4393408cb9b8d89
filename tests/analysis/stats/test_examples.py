"""Statistics on single answers, from predictions files written for the purpose."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

import analysis
from analysis.frames.few_labels import few_label_selection, load_for_rule
from analysis.frames.predictions import example_scores
from analysis.stats.agreement import sample_agreement
from analysis.stats.significance import holm
from analysis.tables.details import example_table
from llmft.errors import UserError

N = 120


def predictions_file(right: dict[tuple[str, str], np.ndarray]) -> bytes:
    """(selection, set) -> which examples are right  # [examples]."""
    columns: dict[str, list] = {name: [] for name in ("selection", "set", "id", "label", "prediction")}
    for (selection, set_name), hits in right.items():
        for i, hit in enumerate(hits):
            row = (selection, set_name, f"{set_name}/{i}", i % 2, i % 2 if hit else 1 - i % 2)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def add(store, seed: int, method: str, rates: dict[str, float], random, **others):
    """A trial whose checkpoints have about these accuracies on hans."""
    hits = {selection: random.random(N) < rate for selection, rate in rates.items()}
    content = predictions_file({(selection, "hans"): hit for selection, hit in hits.items()})
    first = next(iter(hits.values()))
    record = store.add(seed, method, 0.6, float(first.mean()), selections=tuple(rates), predictions=content, **others)
    return record, hits


def test_scores_are_those_of_the_file(store):
    random = np.random.default_rng(0)
    record, hits = add(store, 0, "lora", {"last": 0.5, "best_dev": 0.7}, random)
    frame = analysis.load(store.root)
    for selection in hits:
        scores, unread = example_scores(store.root, frame[frame["selection"] == selection], "hans")
        assert scores.loc[record.digest].to_numpy().tolist() == hits[selection].astype(float).tolist() and unread == []


def test_generated_text_brings_its_own_scores(store):
    table = pa.table({"selection": ["best_dev"] * 3, "set": ["hans"] * 3, "id": ["a", "b", "c"], "rougeL": [0.1, 0.5, 0.9]})
    file = io.BytesIO()
    pq.write_table(table, file)
    store.add(0, predictions=file.getvalue())
    frame = analysis.load(store.root).assign(metric="rougeL")
    scores, _ = example_scores(store.root, frame[frame["selection"] == "best_dev"], "hans")
    assert scores.iloc[0].tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_contrasts_agree_with_brute_force(store):
    random = np.random.default_rng(1)
    right = {
        name: [add(store, s, name, {"best_dev": rate}, random)[1]["best_dev"] for s in range(4)]
        for name, rate in (("lora", 0.8), ("bitfit", 0.6))
    }
    table, unread = analysis.example_contrasts(store.root, analysis.load(store.root))
    row = table.query("domain == 'out_of_domain'").iloc[0]
    a, b = np.array(right["lora"]), np.array(right["bitfit"])
    assert unread == [] and (row["a"], row["b"], row["n_seeds"], row["n_examples"]) == ("lora", "bitfit", 4, N)
    assert row["difference"] == pytest.approx(a.mean() - b.mean()) and row["low"] < row["difference"] < row["high"]
    assert row["only_a"] == pytest.approx((a & ~b).sum(1).mean()) and row["only_b"] == pytest.approx((b & ~a).sum(1).mean())
    p = [scipy.stats.binomtest(int((x & ~y).sum()), int((x ^ y).sum())).pvalue for x, y in zip(a, b, strict=True)]
    assert row["n_mcnemar"] == (holm(p) < 0.05).sum()


def test_zero_shot_stands_beside_every_seed(store):
    random = np.random.default_rng(2)
    for seed in range(3):
        add(store, seed, "lora", {"best_dev": 0.9}, random)
    add(store, 0, "zero_shot", {"none": 0.5}, random, n_shots=0)
    table, _ = analysis.example_contrasts(store.root, analysis.load(store.root))
    assert table[["a", "b", "n_seeds"]].to_numpy().tolist() == [["lora", "zero_shot", 3]]


@pytest.mark.parametrize("n_seeds", [1, 2, 3])
def test_fewer_than_three_seeds_have_no_interval(store, n_seeds):
    random = np.random.default_rng(8)
    for seed in range(n_seeds):
        for name, rate in (("lora", 0.8), ("bitfit", 0.6)):
            add(store, seed, name, {"best_dev": rate}, random)
    table, _ = analysis.example_contrasts(store.root, analysis.load(store.root))
    row = table.query("domain == 'out_of_domain'").iloc[0]
    table = example_table(table[table["domain"] == "out_of_domain"])
    (shown,) = (dict(zip(table.headers, cells, strict=True))["difference (95 %)"] for cells in table.rows)
    assert row["difference"] > 0 and shown.startswith(f"{100 * row['difference']:.1f}")
    assert math.isnan(row["low"]) == math.isnan(row["high"]) == ("(" not in shown) == (n_seeds < 3)


def test_a_truncated_file_is_a_line_and_the_others_count(store):
    random = np.random.default_rng(3)
    records = [add(store, seed, name, {"best_dev": 0.7}, random)[0] for seed in range(3) for name in ("lora", "bitfit")]
    path = store.folder(records[0]) / "predictions.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    table, unread = analysis.example_contrasts(store.root, analysis.load(store.root))
    assert table.query("domain == 'out_of_domain'")["n_seeds"].item() == 2
    assert len(unread) == 1 and "truncated or changed" in unread[0]
    page = analysis.write_report(store.root).read_text()
    assert "truncated or changed" in page


def test_the_checkpoint_that_is_best_on_a_sample_is_scored_on_the_rest(store):
    random = np.random.default_rng(4)
    record, hits = add(store, 0, "lora", {"last": 0.2, "best_dev": 0.9}, random)
    prompted, _ = add(store, 0, "in_context", {"none": 0.6}, random)
    frame, unread = few_label_selection(store.root, analysis.load(store.root), n=40)
    rows = analysis.select(frame, "best_on_40").set_index("method")
    assert unread == [] and len(rows) == 2
    row = rows.loc["lora"]
    assert row["hans_n"] == N - 40 and not row["is_oracle"] and row["selection"] == "best_on_40"
    assert row["in_domain_score"] == 0.6  # of best_dev; that of last is two points lower
    rest = round(row["out_of_domain_score"] * (N - 40))
    assert rest / (N - 40) == pytest.approx(row["out_of_domain_score"]) and rest <= hits["best_dev"].sum() <= rest + 40
    assert rows.loc["in_context", "hans_n"] == N - 40  # the same examples for everyone
    assert math.isnan(row["out_of_domain_mcc"]) and row["gap"] == pytest.approx(0.6 - row["out_of_domain_score"])
    again, _ = few_label_selection(store.root, analysis.load(store.root), n=40)
    assert again["out_of_domain_score"].equals(frame["out_of_domain_score"])
    assert analysis.compare(frame, "best_on_40").query("method == 'lora'")["n"].item() == 1
    assert load_for_rule(store.root, "best_on_40")[0].shape == frame.shape


def test_a_sample_among_oracles_is_an_oracle(store):
    add(store, 0, "lora", {"last": 0.2, "best_out_of_domain": 0.9}, np.random.default_rng(5))
    frame, _ = few_label_selection(store.root, analysis.load(store.root), n=40)
    assert analysis.select(frame, "best_on_40")["is_oracle"].all()


def test_too_few_examples_are_said(store):
    add(store, 0, "lora", {"last": 0.2, "best_dev": 0.9}, np.random.default_rng(6))
    frame, unread = few_label_selection(store.root, analysis.load(store.root), n=N)
    assert "too few" in unread[0] and not (frame["selection"] == f"best_on_{N}").any()
    with pytest.raises(UserError, match=f"no checkpoint can be chosen by 'best_on_{N}' .*too few"):
        load_for_rule(store.root, f"best_on_{N}")


def test_a_sample_ranks_like_the_whole_where_checkpoints_differ(store):
    random = np.random.default_rng(7)
    for seed in range(6):
        add(store, seed, "lora", {"last": 0.1 + 0.15 * seed, "best_dev": 0.15 + 0.15 * seed}, random)
    frame = analysis.load(store.root)
    many, few = (sample_agreement(store.root, frame, "hans", n=n) for n in (50, 2))
    assert many["n_checkpoints"] == 12 and many["pearson"] > 0.95 > few["pearson"] > 0.3
    assert math.isnan(sample_agreement(store.root, frame, "rte")["pearson"])
