"""Chain-of-thought prompting, against plain transformers, one query at a time."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from support.custom_task_files import own_task
from support.small_models import CPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.config.spec import TrainSpec, TrialSpec
from llmft.errors import UserError
from llmft.methods._registry import build_method, complete_settings
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model
from llmft.runtime import Runtime
from llmft.tasks._registry import load_task
from llmft.tasks._toy_language import shared_words, toy_data
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

N_NEW, WORDS = 10, (" Yes", " No")


@pytest.fixture
def why(spec_of, tmp_path):
    """A trial with rationales on a task of the user's own; `marker` ends them."""
    rows = toy_data()
    task = own_task(tmp_path, "why", rows.train[:40], words=("Yes", "No"), tests=rows.in_domain[:12], rationale="why")["why"]

    def make(marker: str = " The answer is", **changed):
        usual = {
            "task": "why",
            "definition": task.definition,
            "data": task.data,
            "pattern": "plain",
            "n_shots": 2,
            "n_dev": 4,
            "n_test": None,
        }
        settings = {"rationales": True, "marker": marker, "max_rationale_tokens": N_NEW} | changed.pop("settings", {})
        return spec_of("in_context", settings, selections=("none",), **usual | changed)

    return make


def table(result):
    rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    return [row for row in rows if row["set"] == "why"]


def by_hand(spec, demonstrations, marker: str):
    """Rationale, whether the marker was reached, and log-probabilities of the label words, for each test row."""
    network, tokenizer = (cls.from_pretrained(spec.model.path) for cls in (AutoModelForCausalLM, AutoTokenizer))
    network.eval()
    shown = [
        f"{one.fields['premise']} {one.fields['hypothesis']} ? {one.rationale}{marker}{WORDS[one.label]}\n\n" for one in demonstrations
    ]
    for pair in toy_data().in_domain[:12]:
        prompt = "".join(shown) + f"{pair.premise} {pair.hypothesis} ?"
        ids = tokenizer(prompt, return_tensors="pt")
        said = network.generate(**ids, max_new_tokens=N_NEW, do_sample=False, pad_token_id=1)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(said).partition("</s>")[0].partition("\n\n")[0]
        rationale, found, _ = text.partition(marker)
        with torch.no_grad():
            answered = tokenizer(prompt + (f" {rationale.strip()}" if rationale.strip() else "") + marker, return_tensors="pt")
            logits = network(**answered).logits[0, -1].log_softmax(-1)
        words = torch.stack([logits[tokenizer.encode(word, add_special_tokens=False)[0]] for word in WORDS])
        yield rationale.strip(), bool(found), words.log_softmax(0).numpy()


def test_a_demonstration_says_why_and_a_query_does_not(why):
    spec = why()
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    text = AutoTokenizer.from_pretrained(spec.model.path).decode([*encoded.prefix, *encoded.sets["why"].suffixes[0]][1:])
    first, second = encoded.demonstrations
    rows = {pair.premise: pair for pair in toy_data().train}
    assert first.rationale == shared_words(rows[first.fields["premise"]])
    expected = "".join(
        f"{one.fields['premise']} {one.fields['hypothesis']} ? {one.rationale} The answer is{WORDS[one.label]}\n\n"
        for one in (first, second)
    )
    query = toy_data().in_domain[0]
    assert text == f"{expected}{query.premise} {query.hypothesis} ?"


@pytest.mark.parametrize("budget", [400, 1 << 14])
def test_rationales_and_scores_are_those_of_plain_transformers(why, budget):
    spec = why()
    result = run_trial(spec, Runtime(device="cpu", micro_batch_tokens=budget))
    assert result.record.finished, result.record.message
    said = [row["rationale"] for row in table(result)]
    often = max(
        (text[at : at + 2] for text in said for at in range(2, len(text) - 1) if text[at : at + 2].isalnum()), key="".join(said).count
    )
    for marker in (" The answer is", often):  # the second is one that this random model comes to, now and then
        spec = why(marker)
        setting, result = prepare_trial(spec), run_trial(spec, Runtime(device="cpu", micro_batch_tokens=budget))
        shown = encode_prompts(spec, setting).demonstrations
        expected, rows = list(by_hand(spec, shown, marker)), table(result)
        assert [row["rationale"] for row in rows] == [rationale for rationale, _, _ in expected]
        assert [row["marker_reached"] for row in rows] == [found for _, found, _ in expected]
        got = np.array([row["label_log_probabilities"] for row in rows])
        np.testing.assert_allclose(got, np.array([scores for _, _, scores in expected]), atol=1e-4)
        share = 1 - np.mean([found for _, found, _ in expected])
        found = {finding.set: finding for finding in result.record.findings if finding.code == "marker_not_reached"}
        assert ("why" in found) == (share > 0)
        if found:
            assert found["why"].value == pytest.approx(share) and found["why"].severity == ("warning" if share >= 0.5 else "note")
        assert (share < 1) == (marker == often)


def test_what_is_generated_counts_as_cost(why):
    plain = why(settings={"rationales": False, "max_rationale_tokens": N_NEW})
    first, second = (run_trial(spec, CPU).record.cost.tokens_evaluated for spec in (plain, why()))
    assert second > first + 16 * N_NEW / 2


def test_demonstrations_make_room_for_the_rationale(why):
    record = run_trial(why(n_shots=8, max_length=150), CPU).record
    assert record.finished and record.draws.n_demonstrations_dropped > 0
    assert run_trial(why(n_shots=8, max_length=150, settings={"max_rationale_tokens": 100}), CPU).record.draws.demonstrations == []


def test_rationales_without_a_column_are_refused(why):
    spec = why()
    without = spec.definition.model_copy(update={"rationale": ""})
    with pytest.raises(UserError, match="rationales: the example train/.* of 'why' has none.*rationale: why"):
        prepare_trial(spec.model_copy(update={"definition": without}))


def test_settings_that_do_not_go_together():
    with pytest.raises(UserError, match="a query without content has no rationale"):
        build_method("in_context", {"rationales": True, "calibration": "contextual"})
    with pytest.raises(UserError, match="marker"):
        build_method("in_context", {"marker": "So: "})


def test_the_column_counts_for_the_digest_and_must_be_there(why, spec_of, tmp_path):
    spec = why()
    without = spec.definition.model_copy(update={"rationale": ""})
    assert spec.model_copy(update={"definition": without}).digest != spec.digest
    with pytest.raises(UserError, match="no column 'because'"):
        own = own_task(tmp_path, "because", toy_data().train[:8], rationale="because")["because"]
        prepare_trial(spec.model_copy(update={"task": "because", "definition": own.definition, "data": own.data}))


def test_a_rationale_and_its_label_word_are_trained_token_by_token(spec_of):
    """The completion loss against plain transformers, each shot alone; the evaluation reads no demonstrations."""
    spec = spec_of("rationale_tuning")
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    assert not encoded.demonstrations
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model, torch.no_grad():
        model.network.eval()
        queries = encoded.sets["shots"]
        batch = make_batch(queries, [0, 3, 5], queries.label_words, model, prefix_ids=encoded.prefix_of("shots"))
        loss = AdaptedModel(setting.method, model)(setting.method.loss, batch).item()
    network, tokenizer = (cls.from_pretrained(spec.model.path) for cls in (AutoModelForCausalLM, AutoTokenizer))
    network.eval()
    each = []
    for place in (0, 3, 5):
        shot = setting.draw.shots[place]
        prompt = f"{shot.fields['premise']} {shot.fields['hypothesis']} ?"
        ids = tokenizer(f"{prompt} {shot.rationale} The answer is{WORDS[shot.label]}</s>")["input_ids"]
        with torch.no_grad():
            likelihoods = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        each.append(-np.mean([likelihoods[at - 1, ids[at]] for at in range(len(tokenizer(prompt)["input_ids"]), len(ids))]))
    assert loss == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.long
def test_the_toy_model_learns_to_say_why():
    settings = complete_settings("rationale_tuning", {"max_rationale_tokens": 12, "marker": " answer:"})
    record = run_trial(
        TrialSpec(
            model=resolve_model("toy"), task="toy", data=load_task("toy").resolve_data(None), method="rationale_tuning",
            n_shots=512, n_dev=0,
            n_test=200, settings=settings, selections=("last",), test_sets=("toy",), train=TrainSpec(learning_rate=2e-3, epochs=10),
        ),
        CPU,
    ).record  # fmt: skip
    assert record.finished and record.metrics["last"]["toy"].accuracy >= 0.62  # 3.4 standard errors above chance
    assert sum(finding.value for finding in record.findings if finding.code == "marker_not_reached") < 0.1
