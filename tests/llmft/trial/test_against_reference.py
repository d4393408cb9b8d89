from __future__ import annotations

import io

import pyarrow.parquet as parquet
import pytest
import torch
from support.small_models import CPU, OPT_350M, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.config.spec import TrialSpec
from llmft.models.info import resolve_model
from llmft.trial.run import run_trial

IN_CONTEXT = {"task": "rte", "method": "in_context", "n_dev": 0, "selections": ("last",)}
WORDS = {0: "Yes", 1: "No"}
FORMATS = {
    "minimal": lambda premise, hypothesis: premise + " " + hypothesis + " ?",
    "gpt-3": lambda premise, hypothesis: premise + " question: " + hypothesis + " Yes or No? answer:",
}


@pytest.fixture(scope="module")
def raw(data_dir):
    """id -> (premise, hypothesis, label), from the parquet files alone."""
    found = {}
    for name, file in (("rte_train", "rte_train"), ("rte_validation", "rte_validation"), ("hans", "hans_regenerated")):
        for index, row in enumerate(parquet.read_table(f"{data_dir}/{file}.parquet").to_pylist()):
            texts = (row["premise"], row["hypothesis"]) if name == "hans" else (row["sentence1"], row["sentence2"])
            found[f"{name}/{index}"] = (*texts, row["label"])
    return found


def run(spec: TrialSpec):
    result = run_trial(spec, CPU)
    assert result.record.finished, result.record.message
    return result.record, parquet.read_table(io.BytesIO(result.predictions)).to_pylist()


@torch.no_grad()
def brute_force(folder: str, record, rows, raw):
    """Every prompt whole, one at a time, through transformers: {id: log-probabilities of the two words, restricted}."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    form, found = FORMATS[record.spec.pattern], {}
    yes_no = [tokenizer(" " + WORDS[label], add_special_tokens=False)["input_ids"] for label in (0, 1)]
    assert [len(ids) for ids in yes_no] == [1, 1]
    shown = [f"{form(*raw[id][:2])} {WORDS[raw[id][2]]}" for id in record.draws.demonstrations]
    for row in rows:
        prompt = "\n\n".join([*shown, form(*raw[row["id"]][:2])])
        logits = model(**tokenizer(prompt, return_tensors="pt"), logits_to_keep=1).logits[0, -1]
        assert row["label"] == raw[row["id"]][2]
        found[row["id"]] = logits[[yes_no[0][0], yes_no[1][0]]].log_softmax(0)
    return found


def compare(folder: str, record, rows, raw) -> None:
    expected = brute_force(folder, record, rows, raw)
    decided = 0
    for row in rows:
        ours, theirs = torch.tensor(row["label_log_probabilities"]), expected[row["id"]]
        assert (ours - theirs).abs().max() < 1e-4, row["id"]
        if (theirs[0] - theirs[1]).abs() > 2e-4:
            decided += 1
            assert row["prediction"] == int(theirs.argmax()), row["id"]
    assert decided > 0.9 * len(expected)
    assert torch.stack(list(expected.values())).std(0).min() > 0.05, "a model that always says the same cannot show a wrong scorer"


@pytest.mark.parametrize(
    ("n_shots", "pattern"),
    [
        *((2, name) for name in FORMATS),
        (16, "gpt-3"),
        *(pytest.param(16, name, marks=pytest.mark.long) for name in FORMATS if name != "gpt-3"),
    ],
)
def test_in_context_on_real_rte_and_hans_equals_one_prompt_at_a_time(rte, rte_opt, raw, n_shots, pattern):
    spec = {**IN_CONTEXT, "model": rte_opt, "data": rte, "n_shots": n_shots, "pattern": pattern}
    record, whole = run(TrialSpec(**spec, test_sets=("rte",)))
    assert len(whole) == 277
    assert len(record.draws.demonstrations) + record.draws.n_demonstrations_dropped == n_shots
    compare(rte_opt.path, record, whole, raw)
    record, hans = run(TrialSpec(**spec, test_sets=("hans", "hans_subsequence", "hans_constituent"), n_test=100))
    assert len(hans) == 300
    assert {row["prediction"] for row in whole} == {0, 1}
    compare(rte_opt.path, record, hans, raw)


@pytest.mark.parametrize(
    ("architecture", "changed"),
    [
        ("opt", OPT_350M),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16}),
    ],
)
def test_other_architectures_equal_one_prompt_at_a_time(tmp_path, rte, rte_tokenizer, raw, architecture, changed):
    model = resolve_model(save_model(tmp_path / architecture, architecture, rte_tokenizer, n_positions=1024, **changed))
    record, rows = run(TrialSpec(**IN_CONTEXT, model=model, data=rte, n_shots=4, test_sets=("rte",), n_test=20))
    assert len(rows) == 20
    compare(model.path, record, rows, raw)


@pytest.mark.parametrize("architecture", ["mamba", "rwkv"])
def test_recurrent_models_read_whole_prompts(tmp_path, rte, rte_tokenizer, raw, architecture):
    model = resolve_model(save_model(tmp_path / architecture, architecture, rte_tokenizer, n_positions=1024))
    record, rows = run(TrialSpec(**IN_CONTEXT, model=model, data=rte, n_shots=2, test_sets=("rte",), n_test=5))
    assert len(record.draws.demonstrations) == 2 and len(rows) == 5
    compare(model.path, record, rows, raw)
