"""Training on a mixture of tasks, against the formula of Raffel et al. 2020 and plain transformers."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest
import torch
from support.custom_task_files import own_task
from support.small_models import CPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmft.config.spec import TaskRef, TrainSpec
from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.evaluation.findings import CODES
from llmft.methods._registry import build_method
from llmft.methods.multi_task import mixing_rates
from llmft.models.adapted import AdaptedModel
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model
from llmft.runtime import Runtime
from llmft.tasks._registry import load_task
from llmft.tasks._toy_language import in_domain_set, toy_data
from llmft.training.loop import _add_gradients
from llmft.trial.mixture import shares
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

TEXT = {"toy_text": TaskRef(data=load_task("toy_text").resolve_data(None))}


@pytest.fixture
def three_tasks(spec_of, tmp_path):
    """A trial on toy with four shots, and a mixture of texts and of a task with long label words and a pattern of its own."""
    others = own_task(tmp_path, "other", toy_data().train[600:700], "{hypothesis} Yes or No? {premise}", ("answer: No", "Maybe"))
    return spec_of("multi_task", {"n_examples": 10, "cap": 200}, mixture=TEXT | others, n_shots=4)


def test_the_rates_by_hand():
    assert mixing_rates([100_000, 5_000, 300], cap=3000) == pytest.approx([3000 / 6300, 3000 / 6300, 300 / 6300])
    assert mixing_rates([100, 300], cap=3000) == pytest.approx([0.25, 0.75])
    heated = [sqrt(3000 / 3300), sqrt(300 / 3300)]
    assert mixing_rates([5_000, 300], cap=3000, temperature=2.0) == pytest.approx([rate / sum(heated) for rate in heated])
    assert mixing_rates([5_000, 300], cap=3000, temperature=1e9) == pytest.approx([0.5, 0.5])


def test_the_shares_are_the_rates_in_whole_numbers():
    assert shares([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert shares([0.55, 0.27, 0.18], 10) == [5, 3, 2]  # 5.5, 2.7, 1.8: the two largest remainders are rounded up
    assert sum(shares(mixing_rates([7, 11, 13], 3000), 100)) == 100


def test_the_record_says_what_was_mixed(three_tasks):
    record = run_trial(three_tasks, CPU).record
    assert record.finished, record.message
    rates = {part.task: (part.rate, part.n, part.n_pool, part.pattern) for part in record.mixture}
    assert rates == {"other": (1 / 3, 3, 100, "plain"), "toy_text": (2 / 3, 7, 1200, "minimal")}  # 100 and, capped, 200
    assert record.cost.n_steps == 2 * 2  # 4 shots and 10 others in batches of 8, twice


def test_the_draws_are_the_data_seeds_and_fewer_are_a_subset_of_more(three_tasks):
    def drawn(seed: int = 0, n: int = 10, **changed):
        changed |= {"settings": {**three_tasks.settings, "n_examples": n}}
        setting = prepare_trial(three_tasks.model_copy(update=changed).with_seed(seed, ["data"]))
        return {part.task: [example.id for example in part.examples] for part in setting.mixture}

    first = drawn()
    assert drawn(order_seed=5, init_seed=5) == first and drawn(1) != first
    assert all(len(set(ids)) == len(ids) and drawn(n=30)[name][: len(ids)] == ids for name, ids in first.items())
    backwards = dict(reversed(three_tasks.mixture.items()))
    assert drawn(mixture=backwards) == first
    again = three_tasks.model_copy(update={"mixture": backwards})
    assert again.digest == three_tasks.digest
    assert run_trial(again, CPU).record.curve == run_trial(three_tasks, CPU).record.curve


@pytest.mark.parametrize("budget", [60, 1 << 16])
def test_a_mixed_batch_counts_every_example_alike(three_tasks, budget):
    """The loss and the gradients are those of the mean over the examples, each read alone by plain transformers."""
    setting = prepare_trial(three_tasks)
    encoded, runtime = encode_prompts(three_tasks, setting), Runtime(device="cpu", micro_batch_tokens=budget)
    rows = [("shots", 1), ("mixture/toy_text", 3), ("mixture/other", 0), ("shots", 0), ("mixture/other", 2), ("mixture/toy_text", 0)]
    lengths = [encoded.lengths(name)[place] for name, place in rows]
    with borrow_model(three_tasks.model, "fp32", torch.device("cpu")) as model:
        setting.method.prepare(model, 2, torch.Generator())
        model.network.eval()
        adapted = AdaptedModel(setting.method, model)
        loss = _add_gradients(
            adapted, Evaluator(adapted, encoded, setting.words, runtime), rows, lengths, torch.amp.GradScaler(enabled=False)
        )
        gradient = model.network.model.decoder.layers[0].fc1.weight.grad.clone()
    network, tokenizer = (cls.from_pretrained(three_tasks.model.path) for cls in (AutoModelForCausalLM, AutoTokenizer))
    network.eval()
    parts = {part.set_name: part for part in setting.mixture}
    said = []
    for name, place in rows:
        fields = (parts[name].examples if name in parts else setting.draw.shots)[place]
        if name == "shots":
            prompt, answer = f"{fields.fields['premise']} {fields.fields['hypothesis']} ?", (" Yes", " No")[fields.label]
        elif name == "mixture/other":
            prompt = f"{fields.fields['hypothesis']} Yes or No? {fields.fields['premise']}"
            answer = (" answer: No", " Maybe")[fields.label]
        else:
            prompt, answer = f"{fields.fields['sentence']} ?", f" {fields.references[0]}</s>"
        ids, n = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
        likelihoods = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        tokens = torch.stack([likelihoods[at - 1, ids[at]] for at in range(n, len(ids))])
        said.append(-tokens.mean() if name == "mixture/toy_text" else -tokens.sum())  # of a label word the whole, of a text the mean
    expected = torch.stack(said).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, network.model.decoder.layers[0].fc1.weight.grad, atol=1e-5, rtol=1e-4)


def test_every_epoch_reads_every_example_once(three_tasks, monkeypatch):
    seen = []

    def note(module, evaluator, rows, lengths, scaler):
        seen.append(rows)
        return _add_gradients(module, evaluator, rows, lengths, scaler)

    monkeypatch.setattr("llmft.training.loop._add_gradients", note)
    assert run_trial(three_tasks, CPU).record.finished
    first = seen[0] + seen[1]
    assert Counter(name for name, _ in first) == {"shots": 4, "mixture/other": 3, "mixture/toy_text": 7}
    assert len(set(first)) == 14 and first != seen[2] + seen[3] and len({name for name, _ in seen[0]}) > 1


def test_held_out_means_that_no_shot_is_read(spec_of):
    record = run_trial(spec_of("multi_task", n_shots=0), CPU).record
    assert record.finished and record.draws.shots == [] and record.draws.shots_hash == ""
    assert "own_task_in_mixture" not in {finding.code for finding in record.findings}


def test_texts_of_the_held_out_task_are_found_in_the_mixture(spec_of, tmp_path):
    rows = toy_data()
    record = run_trial(
        spec_of("multi_task", {"n_examples": 30}, mixture=own_task(tmp_path, "leak", rows.in_domain[:10] + rows.train[:20]), n_shots=0), CPU
    ).record
    found = {finding.code: finding for finding in record.findings if finding.code in ("train_test_overlap", "own_task_in_mixture")}
    assert found["train_test_overlap"].value == 10 and found["train_test_overlap"].set == "toy"
    assert found["own_task_in_mixture"].value == 20 and found.keys() <= CODES.keys()


def test_the_mixture_belongs_to_the_digest(three_tasks, tmp_path):
    def digest(**changed) -> str:
        return three_tasks.model_copy(update={"mixture": {**three_tasks.mixture, **changed}}).digest

    other = three_tasks.mixture["other"]
    moved = other.definition.model_copy(update={"train": other.definition.train.model_copy(update={"file": "/elsewhere"})})
    reworded = other.definition.model_copy(update={"verbalizers": {"words": ("A", "B")}})
    assert digest(other=other.model_copy(update={"definition": moved})) == three_tasks.digest
    assert len({three_tasks.digest, digest(other=other.model_copy(update={"definition": reworded})),
                digest(toy_text=TaskRef()), digest(rte=TaskRef())}) == 4  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings", "changed", "said"),
    [
        ("multi_task", {}, {"mixture": {}}, "name the tasks that it shall train on"),
        ("pattern", {}, {"mixture": TEXT}, "mixture: is for methods that mix tasks, and this one is 'pattern'"),
        ("multi_task", {"n_examples": 1201}, {}, "the share of 'toy_text', 1201 of 1201, is more than the 1200"),
    ],
)
def test_what_cannot_be_mixed_is_refused(spec_of, method, settings, changed, said):
    with pytest.raises(UserError, match=said):
        prepare_trial(spec_of(method, settings, **changed))


def test_a_task_too_small_to_be_drawn_from_is_an_error(three_tasks):
    with pytest.raises(UserError, match=r"n_examples: 1 leave none for 'other', whose rate is 33.33%"):
        prepare_trial(three_tasks.model_copy(update={"settings": {**three_tasks.settings, "n_examples": 1}}))


def test_the_task_that_is_tested_is_never_mixed(spec_of):
    with pytest.raises(ValueError, match="mixture holds 'toy', the trial's own task"):
        spec_of("multi_task", mixture={"toy": TaskRef()})


@pytest.mark.parametrize("student", ["vanilla", "regularised", "finetuned_in_context", "context_distillation", "multi_task", "zero_shot"])
def test_a_student_that_cannot_train_other_tasks_is_refused(student):
    with pytest.raises(UserError, match="the student must|a student reads the query alone"):
        build_method("multi_task", {"student": student})


def test_a_held_out_task_of_texts(spec_of, tmp_path):
    others = own_task(tmp_path, "other", toy_data().train[:40])
    spec = spec_of("multi_task", {"n_examples": 16, "student": "prompt_tuning"}, mixture=others, task="toy_text", n_shots=0)
    record = run_trial(spec.model_copy(update={"generation": load_task("toy_text").generation}), CPU).record
    assert record.finished, record.message


def test_training_on_other_tasks_teaches_the_held_out_one(spec_of, tmp_path):
    """A model that has not seen a row of the toy task learns it from tasks of the same language, and the texts beside it."""
    pairs = in_domain_set(77, 400, set(toy_data().premises))
    mixture = TEXT | own_task(tmp_path, "relative", pairs, words=("Yes", "No"))
    changed = {"model": resolve_model("toy"), "n_shots": 0, "n_dev": 0, "n_test": 200, "selections": ("last",), "mixture": mixture}
    spec = spec_of("multi_task", {"n_examples": 400, "cap": 400}, learning_rate=3e-4, epochs=3, **changed)
    zero = run_trial(spec_of("zero_shot", **changed | {"selections": ("none",), "mixture": {}}), CPU).record
    record = run_trial(spec, CPU).record
    assert record.finished, record.message
    learned, before = record.metrics["last"]["toy"].accuracy, zero.metrics["none"]["toy"].accuracy
    assert learned > 0.8 > 0.65 > before
    assert TrainSpec() != spec.train and record.mixture[0].n == 200
