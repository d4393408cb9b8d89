from __future__ import annotations

import json
import shutil

import pytest
from support.small_models import CPU

from llmft.evaluation.contamination import contamination_findings
from llmft.models.info import read_model_info, resolve_model
from llmft.trial.run import run_trial

FLAN, T5, T0 = "google/flan-t5-xl", "google-t5/t5-large", "bigscience/T0_3B"


@pytest.mark.parametrize(
    ("model", "sets", "held"),
    [(FLAN, ["rte", "rte", "hans"], ["rte"]), (FLAN, ["mnli_3way", "mnli_mismatched"], ["mnli"]), (FLAN, ["qqp_full"], ["qqp"]),
     (FLAN, ["samsum", "commonsense_qa"], ["commonsense_qa", "samsum"]), ("flan-t5-small", ["cola"], ["cola"]),
     ("google/flan-ul2", ["rte"], ["rte"]), ("MBZUAI/LaMini-Flan-T5-783M", ["rte"], ["rte"]), (FLAN, ["hans", "toy", "paws_qqp"], []),
     (T5, ["rte", "samsum"], ["rte"]), ("t5-small", ["cola"], ["cola"]), ("MBZUAI/LaMini-T5-738M", ["rte"], ["rte"]),
     (T0, ["rte", "mnli", "samsum", "qqp"], ["qqp", "samsum"]), ("bigscience/T0pp", ["commonsense_qa"], ["commonsense_qa"]),
     *((name, ["rte", "samsum"], []) for name in (
         "google/t5-v1_1-small", "google/t5-small-lm-adapt", "google/mt5-small", "facebook/opt-125m", "flan-t5-xl/opt-125m", "not0")),
    ],
)  # fmt: skip
def test_what_a_mixture_is_known_to_hold(model, sets, held):
    found = contamination_findings([model, None], sets)
    assert [(each.code, each.severity) for each in found] == [("known_training_task", "warning")] * len(held)
    for finding, dataset in zip(found, held, strict=True):
        assert f"held {dataset} (" in finding.message and "et al. 20" in finding.message


def test_the_model_that_another_was_tuned_from_counts_too(tmp_path, small_opt, spec_of, rte):
    folder = shutil.copytree(small_opt.path, tmp_path / "mine")
    assert read_model_info(small_opt).tuned_from is None
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "google/flan-t5-base"}
    (folder / "config.json").write_text(json.dumps(config))
    ref = resolve_model(str(folder))
    assert read_model_info(ref).tuned_from == "google/flan-t5-base"
    spec = {"task": "rte", "data": rte, "n_test": 4, "test_sets": ("rte",), "n_dev": 2}
    codes = [[each.code for each in run_trial(spec_of(model=model, **spec), CPU).record.findings] for model in (ref, small_opt)]
    assert "known_training_task" in codes[0] and "known_training_task" not in codes[1]
