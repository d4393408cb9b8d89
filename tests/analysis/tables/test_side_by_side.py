"""Two sets of results side by side."""

from __future__ import annotations

import pytest
import scipy.stats
from support.synthetic import Store

import analysis
from analysis.tables.side_by_side import comparison_notes, comparison_sentences, comparison_table, comparison_title
from llmft.errors import Cause, UserError


@pytest.fixture
def two(store, tmp_path):
    other = Store(tmp_path / "other")
    for seed in range(6):
        store.add(seed, "lora", 0.6 + 0.01 * seed, 0.5)
        other.add(seed, "lora", 0.55 + 0.01 * seed + 0.002 * (seed % 3), 0.5, learning_rate=1e-4)
        other.add(seed, "bitfit", 0.5, 0.5)
    store.add(0, "in_context", failed=Cause.LOST)
    other.add(0, "in_context")
    return store, other


def test_the_same_draws_are_paired(two):
    ours, theirs = (analysis.load(each.root) for each in two)
    table = analysis.compare_runs(ours, theirs).set_index(["method", "domain"])
    row = table.loc[("lora", "in_domain")]
    a, b = (analysis.select(each).query("method == 'lora'").sort_values("data_seed")["in_domain_score"] for each in (ours, theirs))
    assert row["test"] == "paired" and row["p"] == pytest.approx(scipy.stats.ttest_rel(a.to_numpy(), b.to_numpy()).pvalue)
    assert row["differs"] == "learning_rate" and row["status"] == "both"


def test_other_draws_are_not_paired(two):
    ours, theirs = (analysis.load(each.root) for each in two)
    table = analysis.compare_runs(ours, theirs.assign(shots_hash="x" + theirs["shots_hash"])).set_index(["method", "domain"])
    assert table.loc[("lora", "in_domain"), "test"] == "welch"


def test_cells_of_one_alone_and_without_result_are_rows(two):
    ours, theirs = (analysis.load(each.root) for each in two)
    status = analysis.compare_runs(ours, theirs).set_index(["method", "domain"])["status"].to_dict()
    assert status[("bitfit", "in_domain")] == "theirs only" and status[("in_context", "in_domain")] == "no result"
    back = analysis.compare_runs(theirs, ours).set_index(["method", "domain"])["status"].to_dict()
    assert back[("bitfit", "in_domain")] == "ours only"
    notes = list(comparison_notes(analysis.compare_runs(ours, theirs), "A", "B"))
    assert "1 cell only in B" in notes and any("differ in learning_rate in 1 cell (lora)" in note for note in notes)


def test_another_number_of_test_examples_is_told(two):
    ours, theirs = (analysis.load(each.root) for each in two)
    fewer = theirs["sets"].str.replace(r'("domain": "in", "n": )\d+', r"\g<1>100", regex=True)
    differs = analysis.compare_runs(ours, theirs.assign(sets=fewer)).set_index(["method", "domain"])["differs"]
    assert differs[("lora", "in_domain")] == "learning_rate, n_test" and differs[("lora", "out_of_domain")] == "learning_rate"


def test_sets_of_other_names_are_not_compared(two):
    ours, theirs = (analysis.load(each.root) for each in two)
    table = analysis.compare_runs(ours, theirs.assign(in_domain_set="rte2")).query("method == 'lora' and domain == 'in_domain'")
    assert table["status"].item() == "another set" and table["p"].isna().all()


def test_own_results_beside_the_paper(store):
    for seed in range(10):
        store.add(seed, "pattern", 0.53 + 0.002 * seed, 0.5 + 0.001 * seed, model="models/opt-125m")
    table = analysis.compare_runs(analysis.load(store.root), analysis.load_published())
    both = table[table["status"] == "both"].set_index("domain")
    assert set(both.index) == {"in_domain", "out_of_domain"} and set(both["test"]) == {"welch"}
    assert set(both["other_rule"]) == {"last"} and set(both["rule"]) == {"best_dev"}
    published = analysis.load_published().query(
        "model == 'facebook/opt-125m' and task == 'rte' and method == 'pattern' and n_shots == 16 and selection == 'last'"
    )
    assert both.loc["in_domain", "other_mean"] == pytest.approx(published["in_domain_score"].mean())
    (inside, _) = comparison_sentences(table, "ours", "the paper")
    assert inside.startswith("models/opt-125m, rte, pattern, 16 shots, minimal, in domain (rte): 53.9 ± 0.4 % in ours, ")
    assert "best_dev in ours and last in the paper" in comparison_title(table, "ours", "the paper")
    assert "Mosbach et al. 2023" in analysis.write_report(store.root).read_text()


def test_an_oracle_is_called_so(store):
    store.add(0, selections=("best_in_domain",)), store.add(1, selections=("best_in_domain",))
    frame = analysis.load(store.root)
    assert "an oracle" in comparison_title(analysis.compare_runs(frame, frame, "best_in_domain"), "A", "B")


def test_nothing_in_common_says_what_there_is(store, tmp_path):
    store.add(0, "lora")
    other = Store(tmp_path / "other")
    other.add(0, "bitfit", n_shots=32)
    with pytest.raises(UserError, match="nothing in common: one has lora on rte with opt-125m; the other has bitfit"):
        analysis.compare_runs(analysis.load(store.root), analysis.load(other.root))


def test_differences_on_common_seeds_say_so(store, tmp_path):
    other = Store(tmp_path / "other")
    for seed in range(6):
        other.add(seed, "lora", 0.6 + 0.03 * seed)
        if seed < 3:
            store.add(seed, "lora", 0.6 + 0.03 * seed)
    table = analysis.compare_runs(analysis.load(store.root), analysis.load(other.root))
    row = table.query("domain == 'in_domain'").iloc[0]
    assert (row["n"], row["other_n"], row["n_compared"], row["difference"]) == (3, 6, 3, 0.0)
    shown = comparison_table(table, "A", "B")
    assert [row[-1] for row in shown.rows] == ["on 3 common seeds"] * 2
    assert any("over the common seeds" in note for note in comparison_notes(table, "A", "B"))
    assert "on 3 common seeds)" in next(comparison_sentences(table, "A", "B"))
    same = analysis.compare_runs(analysis.load(other.root), analysis.load(other.root))
    assert not any("common seeds" in note for note in comparison_notes(same, "A", "B"))
