"""Methods against each other: pairing by seed, the correction, what can be told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

import analysis
from analysis.frames.columns import COLUMNS
from analysis.report.verdict import Verdict, write_verdicts
from analysis.stats.comparisons import build_families
from analysis.tables.ranking import build_ranking
from analysis.tables.render import to_markdown
from llmft.errors import Cause, UserError
from llmft.records.record import Finding


def own(scores: dict[str, list[float]], **columns) -> pd.DataFrame:
    """A frame with a run for each method and seed."""
    rows = [
        {"model": "m", "task": "t", "method": name, "n_shots": 16, "data_seed": seed, "out_of_domain_score": value, **columns}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return analysis.from_dataframe(pd.DataFrame(rows))


def random_scores(n: int = 7, seed: int = 0) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    shared = random.normal(0, 0.05, n)
    return {name: list(0.6 + shift + shared + random.normal(0, 0.01, n)) for name, shift in (("a", 0), ("b", 0.004), ("c", 0.05))}


def test_differences_are_paired_and_corrected_for_all_pairs():
    scores = random_scores()
    table = analysis.contrast_table(own(scores)).set_index(["a", "b"])
    p = {pair: scipy.stats.ttest_rel(scores[pair[0]], scores[pair[1]]).pvalue for pair in table.index}
    assert len(table) == 3 and table["p"].to_dict() == pytest.approx(p)
    assert table["p_holm"].tolist() == pytest.approx(multipletests(list(p.values()), method="holm")[1].tolist())
    assert (table["difference"] > 0).all() and set(table["test"]) == {"paired"} and set(table["n"]) == {7}


def test_only_shared_seeds_are_paired():
    scores = random_scores()
    frame = own(scores)
    frame = frame[~((frame["method"] == "a") & (frame["data_seed"] == 3))]
    row = analysis.contrast_table(frame).set_index(["a", "b"]).loc[("c", "a")]
    rest = [seed for seed in range(7) if seed != 3]
    assert row["n"] == 6
    expected = scipy.stats.ttest_rel(np.array(scores["c"])[rest], np.array(scores["a"])[rest])
    assert row["p"] == pytest.approx(expected.pvalue)


def test_runs_without_seeds_are_compared_by_welch():
    scores = random_scores()
    row = analysis.contrast_table(own(scores).assign(data_seed=pd.NA)).set_index(["a", "b"]).loc[("c", "a")]
    assert row["test"] == "welch"
    assert row["p"] == pytest.approx(scipy.stats.ttest_ind(scores["c"], scores["a"], equal_var=False).pvalue)


def test_other_seeds_pair_where_the_examples_do_not_vary():
    scores = random_scores()
    frame = own(scores)
    row = analysis.contrast_table(frame.assign(init_seed=frame["data_seed"], data_seed=0)).set_index(["a", "b"]).loc[("c", "a")]
    assert row["n"] == 7 and row["p"] == pytest.approx(scipy.stats.ttest_rel(scores["c"], scores["a"]).pvalue)


def test_baselines_are_constants_and_stand_at_every_number_of_shots(full_store):
    frame = analysis.load(full_store.root)
    table = analysis.contrast_table(frame)
    row = table.query("n_shots == 16 and domain == 'in_domain' and a == 'lora' and b == 'majority_class'").iloc[0]
    lora = analysis.select(frame).query("method == 'lora' and n_shots == 16")["in_domain_score"]
    assert row["test"] == "constant" and row["p"] == pytest.approx(scipy.stats.ttest_1samp(lora, 0.527).pvalue)
    assert {16, 128} == set(table["n_shots"]) and set(table.query("b == 'zero_shot'")["n_shots"]) == {16, 128}
    assert table.query("a in ['zero_shot', 'majority_class'] and b in ['zero_shot', 'majority_class']")["p"].isna().all()


def test_bold_are_those_that_nothing_beats():
    table = analysis.compare(own(random_scores())).set_index("method")
    assert table["out_of_domain_top"].to_dict() == {"a": False, "b": False, "c": True}
    assert not table["in_domain_top"].any()
    alone = analysis.compare(own({"a": [0.5, 0.6]}))
    assert not alone["out_of_domain_top"].any()


def test_the_ranking_shows_what_cannot_be_told_apart():
    (family,) = build_families(own(random_scores()))
    assert [[sample.method for sample in group] for group in family.groups] == [["c"], ["b", "a"]]
    table = build_ranking(family).table
    assert [row[0] for row in table.rows] == ["c", "b", "a"] and [row[-1] for row in table.rows] == ["A·", "·B", "·B"]


def answer(frame) -> Verdict:
    (only,) = write_verdicts(frame)
    return only


def test_the_answer_names_the_best_with_its_margin():
    scores = random_scores()
    only = answer(own(scores))
    assert only.out_of_domain_sure
    mean, difference = np.mean(scores["c"]), np.subtract(scores["c"], scores["b"])
    low, high = scipy.stats.t.interval(0.95, 6, difference.mean(), scipy.stats.sem(difference))
    assert only.out_of_domain.startswith(f"Out of domain, c is best at 16 shots: {100 * mean:.1f} % (")
    assert f"ahead of b by {100 * difference.mean():.1f} points ({100 * low:.1f} to {100 * high:.1f}; p" in only.out_of_domain
    assert only.in_domain == "In domain, there is no result." and not only.in_domain_sure


def test_pairing_sees_what_overlapping_intervals_hide():
    scores = random_scores()
    table = analysis.compare(own(scores)).set_index("method")
    lows = table["out_of_domain_mean"] - table["out_of_domain_half_width"]
    assert lows["c"] < table.loc["b", "out_of_domain_mean"] + table.loc["b", "out_of_domain_half_width"]
    assert answer(own(scores)).out_of_domain_sure


def test_the_answer_says_what_one_cannot_tell():
    only = answer(own({"a": [0.6, 0.7, 0.65, 0.62], "b": [0.61, 0.66, 0.68, 0.6], "c": [0.4, 0.41, 0.4, 0.42]}))
    text = only.out_of_domain
    assert not only.out_of_domain_sure and "one cannot tell which of a and b is best at 16 shots: a leads with 64.2 %" in text
    assert "b follows" in text and "With 4 seeds, a true difference below about" in text and "c" not in text.split("which of ")[1][:8]


def test_the_answer_says_that_nothing_beats_the_majority():
    below = own({"a": [0.5, 0.51, 0.49], "b": [0.47, 0.48, 0.5]}, out_of_domain_majority=0.6)
    assert "no method beats the majority class (60.0 %) at 16 shots; the nearest is a with 50.0 %" in answer(below).out_of_domain
    near = own({"a": [0.6, 0.7, 0.65, 0.5], "b": [0.55, 0.66, 0.6, 0.5]}, out_of_domain_majority=0.58)
    assert "no method is shown to beat the majority class (58.0 %) at 16 shots: a leads with" in answer(near).out_of_domain


def test_a_higher_mean_at_another_number_of_shots_is_named_beside_the_answer(store):
    """Methods are compared where most of them are, which need not be where the best number stands."""
    for seed in range(6):
        for method, n_shots, accuracy in (("a", 16, 0.6), ("b", 16, 0.5), ("c", 2, 0.7), ("a", 2, 0.4)):
            store.add(seed, method, accuracy + 0.01 * (seed % 2), 0.5, n_shots=n_shots)
    only = answer(analysis.load(store.root))
    assert "a is best at 16 shots" in only.in_domain
    assert only.in_domain.endswith(" The highest mean at any number of shots: c with 2, 70.5 % (69.9 to 71.1).")
    assert "any number" not in only.out_of_domain


def test_one_trial_tells_nothing():
    only = answer(own({"a": [0.9], "b": [0.6]}))
    assert not only.out_of_domain_sure and "a single trial allows no test" in only.out_of_domain
    assert "there is nothing to compare it with" in answer(own({"a": [0.9, 0.8]})).out_of_domain


def test_a_suspicious_number_is_never_sure(store):
    finding = Finding(code="constant_prediction", severity="warning", message="m", set="hans")
    for seed in range(6):
        store.add(seed, "fine_tuning", 0.7 + 0.001 * seed, 0.8, findings=[finding])
        store.add(seed, "lora", 0.6, 0.6 + 0.001 * seed)
    only = answer(analysis.load(store.root))
    assert only.in_domain_sure and not only.out_of_domain_sure
    assert "warning: constant prediction on hans in 6 of 6 trials." in only.out_of_domain


def test_methods_are_compared_at_the_same_shots(store):
    for seed in range(3):
        store.add(seed, "fine_tuning", 0.6 + 0.001 * seed), store.add(seed, "in_context", 0.65 + 0.001 * seed * (-1) ** seed)
        store.add(seed, "fine_tuning", 0.9 + 0.001 * seed, n_shots=1024)
    assert "in_context is best at 16 shots" in answer(analysis.load(store.root)).in_domain


def test_a_metric_that_is_no_share_has_no_percent_sign():
    frame = own(random_scores()).assign(metric="rougeL")
    text = answer(frame).out_of_domain
    assert text.startswith("Out of domain (rougeL × 100), c is best at 16 shots: 66.4 (") and "%" not in text
    assert "RougeL × 100 (± 95 % interval)." in to_markdown(analysis.compare(frame))


def test_failures_do_not_break_the_pairing(store):
    for seed in range(6):
        store.add(seed, "lora", 0.7 + 0.01 * seed, failed=Cause.LOST if seed == 2 else None)
        store.add(seed, "fine_tuning", 0.6 + 0.01 * seed + 0.001 * (seed % 2))
    row = analysis.contrast_table(analysis.load(store.root)).query("a == 'lora' and b == 'fine_tuning' and domain == 'in_domain'")
    assert row["n"].item() == 5 and row["test"].item() == "paired"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.drop(columns="method"), "no column 'method'"),
        (lambda data: data.drop(columns="out_of_domain_score"), "neither in_domain_score nor"),
        (lambda data: data.assign(out_of_domain_score=61.0), "divide percentages by 100"),
        (lambda data: data.assign(data_seed="first"), "must be Int64"),
    ],
)
def test_a_frame_that_cannot_be_used_says_why(change, message):
    data = pd.DataFrame({"model": ["m"], "task": ["t"], "method": ["a"], "data_seed": [0], "out_of_domain_score": [0.5]})
    with pytest.raises(UserError, match=message):
        analysis.from_dataframe(change(data))


def test_an_own_frame_keeps_what_it_has_and_has_all_columns():
    frame = own({"a": [0.5, 0.6]}, colour="red")
    assert {column.name: str(frame[column.name].dtype) for column in COLUMNS} == {c.name: c.dtype for c in COLUMNS}
    assert set(frame["colour"]) == {"red"} and set(frame["stage"]) == {"report"}
