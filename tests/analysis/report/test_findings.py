from __future__ import annotations

import pytest
from support.synthetic import set_metrics

import analysis
from analysis.report.findings import CROSS_CODES
from llmft.errors import Cause
from llmft.records.manifest import Manifest, SearchChoice


def found(store, rule="best_dev", manifest=None) -> dict:
    findings = analysis.cross_findings(analysis.load(store.root), rule, manifest)
    assert {each.code for each in findings} <= set(CROSS_CODES)
    return {each.code: each for each in findings}


def test_a_sound_comparison_has_none(store):
    for seed in range(6):
        store.add(seed), store.add(seed, "in_context")
    store.add(0, "zero_shot", n_shots=0)
    assert found(store) == {}


def test_different_seeds_with_the_same_draw(store):
    store.add(0, shots_hash="same"), store.add(1, shots_hash="same"), store.add(0, "lora", shots_hash="same")
    finding = found(store)["identical_draws"]
    assert "fine_tuning, 16 shots" in finding.message and finding.severity == "warning"


def test_the_same_draw_for_two_methods_is_what_we_want(store):
    store.add(0, shots_hash="same"), store.add(0, "lora", shots_hash="same"), store.add(0, "in_context", shots_hash="same")
    assert "identical_draws" not in found(store)


def test_failures_name_cell_share_and_cause(store):
    store.add(0), store.add(1, failed=Cause.DIVERGED), store.add(2, failed=Cause.LOST), store.add(3)
    finding = found(store)["failed_trials"]
    assert finding.value == 0.5 and "2 of 4" in finding.message and "diverged 1" in finding.message


def test_where_every_trial_failed_there_is_no_mean(store):
    store.add(0, failed=Cause.USER_ERROR)
    assert found(store)["failed_trials"].message.endswith("1 of 1 trials failed (user_error 1), so there is no mean")


def test_unreadable_records(store):
    store.add(0)
    (store.folder(store.add(1)) / "record.json").write_text("{")
    assert found(store)["unreadable_records"].value == 1


def test_unbalanced_and_few_seeds(store):
    for seed in range(6):
        store.add(seed)
    store.add(0, "lora"), store.add(1, "lora")
    findings = found(store)
    assert "from 2 trials (lora" in findings["unbalanced_seeds"].message
    assert findings["few_seeds"].value == 2 and findings["few_seeds"].severity == "note"


def test_zero_shot_absent(store):
    store.add(0)
    assert "zero_shot_absent" in found(store)
    store.add(0, "zero_shot", n_shots=0)
    assert "zero_shot_absent" not in found(store)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"learning_rate": 1e-4}, "learning_rate"), ({"verbalizer": "yes_no"}, "verbalizer"), ({"settings": {"rank": 8}}, "settings"),
     ({"train": {"patience": 3}}, "patience"), ({"train": {"epochs": 9, "layer_decay": 0.5}}, "epochs, layer_decay")],
)  # fmt: skip
def test_a_cell_of_different_settings(store, change, said):
    store.add(0), store.add(1, **change)
    assert f"trials differ in {said}, and" in found(store)["mixed_settings"].message


def test_different_test_sets(store):
    store.add(0), store.add(1, sets={"rte": set_metrics(0.6, n=100)})
    assert "mixed_test_sets" in found(store)


def test_the_order_of_sets_is_no_difference(store):
    rte, hans = set_metrics(0.6), set_metrics(0.5, "out")
    store.add(0, sets={"rte": rte, "hans": hans}), store.add(1, sets={"hans": hans, "rte": rte})
    assert "mixed_test_sets" not in found(store)


def test_checkpoints_that_are_not_there(store):
    store.add(0), store.add(1, selections=("last",))
    assert found(store)["no_selection"].value == 1
    assert "no_selection" not in found(store, "last")


def test_oracles_are_called_so(store):
    store.add(selections=("best_in_domain",))
    assert "oracle_selection" in found(store, "best_in_domain")


def test_the_manifest_tells_of_missing_trials_and_budgets(store):
    record = store.add(0)
    choices = tuple(SearchChoice(cell={"method": name}, n_search_trials=n) for name, n in (("lora", 8), ("bitfit", 4)))
    findings = found(store, manifest=Manifest(report=(record.digest, "gone"), choices=choices))
    assert findings["missing_trials"].value == 1 and "1 of 2" in findings["missing_trials"].message
    assert "between 4 and 8" in findings["unequal_search"].message
