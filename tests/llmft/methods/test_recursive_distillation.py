"""Context distillation in rounds, against the same by hand and by plain transformers."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from scipy.special import log_softmax
from support.small_models import CPU
from support.teachers import prompts_of, word_ids
from transformers import AutoModelForCausalLM

from llmft.config.spec import TrainSpec, TrialSpec
from llmft.errors import Cause, UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._registry import METHODS, build_method, complete_settings, method_class
from llmft.models.info import resolve_model
from llmft.models.loading import load_tokenizer
from llmft.prompting.encoding import DEV
from llmft.tasks._registry import load_task
from llmft.trial import run as trials
from llmft.trial.distillation import refresh_targets
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import run_trial
from llmft.trial.weights import restored

DISTILLED = "context_distillation"
FEW = {"n_unlabelled": 12}
KEEPING = replace(CPU, keep_weights=True)


@pytest.fixture
def taught(monkeypatch):
    """What each further round of a trial is taught, from its second on."""
    found: list[dict[str, torch.Tensor]] = []

    def again(adapted, setting, *more):
        refresh_targets(adapted, setting, *more)
        found.append({name: rows.clone() for name, rows in setting.method.teacher_targets.items()})

    monkeypatch.setattr(trials, "refresh_targets", again)
    return found


def ids_of(spec: TrialSpec, setting, demonstrations, examples) -> list[list[int]]:
    return load_tokenizer(spec.model)(prompts_of(spec, setting, demonstrations, examples))["input_ids"]


def said(network, words: list[int], prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, labels]: the label words' log-probabilities after each whole prompt, one at a time."""
    return torch.stack([network(torch.tensor([ids])).logits[0, -1, words].log_softmax(-1) for ids in prompts])


def test_two_rounds_by_hand(spec_of, taught):
    """Full batches, so that their order does not matter."""
    how = {"epochs": 3, "batch_size": 16, "schedule": "linear", "clip_norm": None, "epsilon": 1e-4, "learning_rate": 3e-3}
    spec = spec_of(DISTILLED, FEW | {"rounds": 2}, n_shots=8, selections=("last",), **how)
    result, setting = run_trial(spec, CPU), prepare_trial(spec)
    (lesson,), words = encode_teacher_prompts(spec, setting), word_ids(setting)
    inputs, dev = setting.draw.unlabelled, setting.draw.dev
    network = AutoModelForCausalLM.from_pretrained(spec.model.path).eval()
    scores = []
    for _ in range(2):
        with torch.no_grad():
            targets = said(network, words, ids_of(spec, setting, lesson.demonstrations, inputs))
            best = said(network, words, ids_of(spec, setting, lesson.demonstrations, dev)).argmax(1)
        scores.append(np.mean(best.numpy() == [example.label for example in dev]))
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.0)
        for factor in (1.0, 1.0, 0.5):
            optimizer.param_groups[0]["lr"] = 3e-3 * factor
            own = said(network, words, ids_of(spec, setting, (), inputs))
            loss = (targets.exp() * (targets - own)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    record = result.record
    np.testing.assert_allclose(taught[0]["outcomes"][:, 0], targets, atol=1e-4)
    assert [each.dev_score for each in record.teacher.rounds] == pytest.approx(scores)
    assert record.teacher.dev_score == pytest.approx(scores[0])
    assert record.curve[-1].train_loss == pytest.approx(float(loss.detach()), rel=1e-2)
    assert [point.learning_rate for point in record.curve] == pytest.approx([3e-3, 3e-3, 1.5e-3] * 2)
    (test,) = [test for test in setting.tests if test.name == "toy"]
    with torch.no_grad():
        expected = said(network, words, ids_of(spec, setting, (), test.examples))
    rows = [row for row in parquet.read_table(io.BytesIO(result.predictions)).to_pylist() if row["set"] == "toy"]
    np.testing.assert_allclose([row["label_log_probabilities"] for row in rows], expected, atol=1e-3)


@pytest.mark.parametrize("student", ["bitfit", "lora", "prompt_tuning", "prefix_tuning"])
def test_the_student_reads_the_lesson_as_plain_transformers_does(spec_of, tmp_path, taught, student):
    """Its weights after the first round are those of a trial of one round, and so is its curve until then."""
    settings = FEW | {"student": student, "distil_shots": True}
    one, two = (spec_of(DISTILLED, settings | {"rounds": n}, n_shots=4, selections=("last",), learning_rate=3e-2) for n in (1, 2))
    first, second = run_trial(one, KEEPING), run_trial(two, CPU)
    assert first.record.curve == second.record.curve[:2] and not first.record.teacher.rounds[1:]
    (tmp_path / "weights").write_bytes(first.weights)
    setting, (found,) = prepare_trial(two), taught
    with restored(one, tmp_path / "weights", torch.device("cpu")) as adapted, torch.no_grad():
        network, inputs = adapted.network, setting.training_examples
        for lesson, prompts in zip(setting.recipe.teacher.prompts, encode_teacher_prompts(two, setting), strict=True):
            ids = ids_of(two, setting, prompts.demonstrations, [inputs[i] for i in lesson.examples])
            logits = np.stack([opened(network, student, row).double().numpy() for row in ids])
            expected = log_softmax(logits[:, word_ids(setting)], axis=1)
            np.testing.assert_allclose(found["outcomes"][list(lesson.examples), 0], expected, atol=2e-5)
            assert len(prompts.demonstrations) == (4 if max(lesson.examples) < 12 else 2)


def opened(network, student: str, ids: list[int]) -> torch.Tensor:
    """[vocabulary] after `ids`, behind what the student has learned."""
    from transformers import DynamicCache

    ids = torch.tensor([ids])
    if student == "prompt_tuning":
        embedded = torch.cat([network.soft_prompt()[None], network.get_input_embeddings()(ids)], 1)
        return network(inputs_embeds=embedded).logits[0, -1]
    if student == "prefix_tuning":
        vectors, config = network.soft_prompt(), network.config
        layers = vectors.view(len(vectors), config.num_hidden_layers, 2, config.num_attention_heads, -1)
        layers = layers.permute(1, 2, 3, 0, 4)[:, :, None]  # layers, keys and values, 1, heads, virtual tokens, size
        mask = torch.ones(1, len(vectors) + ids.shape[1], dtype=torch.long)
        cache = DynamicCache([(keys, values) for keys, values in layers])
        return network(ids, past_key_values=cache, attention_mask=mask).logits[0, -1]
    return network(ids).logits[0, -1]


def test_steps_epochs_and_looks_go_on(spec_of):
    spec = spec_of(DISTILLED, FEW | {"rounds": 3}, epochs=3, eval_every_epochs=2)
    record = run_trial(spec, CPU).record
    assert [(point.epoch, point.step) for point in record.curve] == [(2, 4), (3, 6), (5, 10), (6, 12), (8, 16), (9, 18)]
    best = max(range(6), key=lambda i: (record.curve[i].dev_score, -record.curve[i].dev_loss))
    assert record.selected_step == {"last": 18, "best_dev": record.curve[best].step}
    assert record.cost.n_steps == 18 and len(record.teacher.rounds) == 3


def test_the_best_state_may_be_of_an_earlier_round(spec_of, tmp_path):
    """The end of the first, here: the model is no longer there, so its weights were kept."""
    spec = spec_of(DISTILLED, FEW | {"rounds": 2}, learning_rate=5e-2, eval_every_epochs=2, n_dev=16)
    result = run_trial(spec, KEEPING)
    record = result.record
    assert record.selected_step == {"last": 8, "best_dev": 4}, "else another seed shows it"
    assert record.dev_loss["best_dev"] != record.dev_loss["last"]
    (tmp_path / "weights").write_bytes(result.weights)
    setting = prepare_trial(spec)
    with restored(spec, tmp_path / "weights", torch.device("cpu")) as adapted:
        again = Evaluator(adapted, encode_prompts(spec, setting), setting.words, CPU).predict(DEV)
    assert again.loss == pytest.approx(record.dev_loss["best_dev"], rel=1e-5)


def test_the_cost_of_all_rounds_is_counted(spec_of):
    one, two = (run_trial(spec_of(DISTILLED, FEW | {"rounds": n}), CPU).record.cost for n in (1, 2))
    setting = prepare_trial(spec_of(DISTILLED, FEW))
    (lesson,) = encode_teacher_prompts(spec_of(DISTILLED, FEW), setting)
    read = sum(len(ids) for queries in lesson.sets.values() for ids in queries.suffixes)
    again = read + 2 * len(lesson.prefix)  # once for each set, since the weights of one who learns may move
    assert two.tokens_teacher == one.tokens_teacher + again
    assert (two.tokens_trained, two.n_steps) == (2 * one.tokens_trained, 2 * one.n_steps)
    assert two.flops == pytest.approx(two.n_parameters * (6 * two.tokens_trained + 2 * two.tokens_evaluated + 2 * two.tokens_teacher))


def test_all_rounds_have_demonstrations_that_fit_behind_the_virtual_tokens(spec_of):
    """So many as in the trial of a shorter context."""
    student = {"student": "prompt_tuning", "student_settings": {"n_virtual_tokens": 60}}
    given = spec_of(DISTILLED, FEW)
    (whole,) = encode_teacher_prompts(given, prepare_trial(given))
    limit = len(whole.prefix) + max(len(ids) for queries in whole.sets.values() for ids in queries.suffixes)
    records = {
        name: run_trial(spec_of(DISTILLED, settings, max_length=length, epochs=1, selections=("last",)), CPU).record
        for name, settings, length in (
            ("one round", FEW | student, limit),
            ("two rounds", FEW | student | {"rounds": 2}, limit),
            ("shorter", FEW, limit - 60),
        )
    }
    dropped = {name: record.teacher.n_demonstrations_dropped for name, record in records.items()}
    assert dropped["one round"] == 0 < dropped["two rounds"] == dropped["shorter"]
    assert records["two rounds"].teacher.demonstrations == records["shorter"].teacher.demonstrations
    assert records["two rounds"].teacher.rounds[0].dev_score == records["shorter"].teacher.dev_score


def test_a_query_that_does_not_fit_behind_the_virtual_tokens_is_found_before_the_training(spec_of):
    settings = FEW | {"rounds": 2, "student": "prompt_tuning", "student_settings": {"n_virtual_tokens": 60}}
    record = run_trial(spec_of(DISTILLED, settings | {"instruction": "Say it. " * 30}, max_length=110), CPU).record
    assert record.cause == Cause.QUERY_TOO_LONG and "60 virtual tokens" in record.message and not record.curve


def test_the_control_without_context_learns_nothing_new(spec_of):
    settings = FEW | {"rounds": 2, "teacher_context": "none"}
    record = run_trial(spec_of(DISTILLED, settings, epochs=1, batch_size=16, n_shots=4), CPU).record
    assert [point.train_loss for point in record.curve] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_small_passes_change_no_answer(spec_of):
    spec = spec_of(DISTILLED, FEW | {"rounds": 2}, n_shots=6, epsilon=1e-4)
    first, second = (run_trial(spec, replace(CPU, micro_batch_tokens=n)).record for n in (16384, 60))
    assert [p.train_loss for p in first.curve] == pytest.approx([p.train_loss for p in second.curve], abs=1e-4)


def test_a_student_that_has_no_memory_for_its_lesson_starts_again_with_smaller_passes(spec_of, monkeypatch):
    budgets = []

    def again(adapted, setting, lessons, runtime, teaching):
        budgets.append(runtime.micro_batch_tokens)
        if len(budgets) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        refresh_targets(adapted, setting, lessons, runtime, teaching)

    monkeypatch.setattr(trials, "refresh_targets", again)
    record = run_trial(spec_of(DISTILLED, FEW | {"rounds": 2}), CPU).record
    assert record.finished and record.cost.n_out_of_memory == 1 and len(record.curve) == 4
    assert budgets[1] < budgets[0] and record.cost.micro_batch_tokens == budgets[1]


def test_a_stop_between_epochs_ends_all_rounds(spec_of):
    record = run_trial(spec_of(DISTILLED, FEW | {"rounds": 2}), replace(CPU, should_stop=lambda: True)).record
    assert record.finished and [point.epoch for point in record.curve] == [1] and len(record.teacher.rounds) == 1


def test_patience_ends_a_round_and_the_next_one_has_its_own(spec_of):
    spec = spec_of(DISTILLED, FEW | {"rounds": 2}, learning_rate=2e-2, epochs=8, patience=2, n_dev=16)
    record = run_trial(spec, CPU).record
    epochs, best, left = [], (-1.0, 0.0), 2
    for point in record.curve:
        assert left, "a round went on"
        best, left = ((point.dev_score, -point.dev_loss), 2) if (point.dev_score, -point.dev_loss) > best else (best, left - 1)
        epochs.append(point.epoch)
        if not left and point.epoch <= 8:
            left, ended = 2, point.epoch
    first, second = [epoch for epoch in epochs if epoch <= 8], [epoch for epoch in epochs if epoch > 8]
    assert first == list(range(1, ended + 1)) and ended < 8, "else another seed shows it"
    assert second == list(range(9, 9 + len(second))) and len(second) >= 2
    assert len(record.teacher.rounds) == 2 and record.cost.n_steps == record.curve[-1].step == 2 * len(epochs)


def test_what_cannot_teach_itself_is_refused(spec_of):
    with pytest.raises(UserError, match="rounds: the student 'vanilla' has a head of its own"):
        build_method(DISTILLED, {"rounds": 2, "student": "vanilla"})
    with pytest.raises(UserError, match="greater than or equal to 1"):
        build_method(DISTILLED, {"rounds": 0})
    spec = spec_of(
        DISTILLED, FEW | {"rounds": 2}, teacher=spec_of("pattern").model.model_copy(update={"name": "large", "fingerprint": "x"})
    )
    with pytest.raises(UserError, match="this one has another, large") as raised:
        trials.check_spec(spec)
    assert "\n" not in str(raised.value)
    prepare_trial(spec_of(DISTILLED, FEW | {"rounds": 2}, teacher=spec_of("pattern").model))  # itself


@pytest.mark.long
@pytest.mark.parametrize("student", [name for name in METHODS if method_class(name).trains])
def test_every_student_with_words_teaches_itself(spec_of, wide_opt, student):
    try:
        spec = spec_of(DISTILLED, FEW | {"rounds": 2, "student": student}, n_shots=4, model=wide_opt, precision="bf16")
    except UserError as error:
        assert method_class(student).has_own_head or "student" in str(error)
        return
    if method_class(student).base_weights != "fp32":
        pytest.importorskip("bitsandbytes")
    record = run_trial(spec, CPU).record
    assert record.finished, record.message
    assert len(record.teacher.rounds) == 2 and not method_class(student).has_own_head


# --- the toy task


@pytest.mark.long
def test_a_second_round_of_lora_loses_no_more_than_noise():
    """A guard against a second round that destroys the first; no gain is promised. (Whole models are another matter: trained on
    queries alone, they read demonstrations worse than before, which the record's `teacher_got_worse` says.)"""
    scores = []
    for seed in range(4):
        settings = complete_settings(DISTILLED, {"n_unlabelled": 256, "rounds": 2, "student": "lora"})
        spec = TrialSpec(
            model=resolve_model("toy"), task="toy", data=load_task("toy").resolve_data(None), method=DISTILLED, settings=settings,
            n_shots=16, n_dev=256, test_sets=(), selections=("last",),
            train=TrainSpec(learning_rate=3e-3, epochs=10, eval_every_epochs=10),
        )  # fmt: skip
        record = run_trial(spec.with_seed(seed), CPU).record
        scores.append([point.dev_score for point in record.curve])
        print(f"seed {seed}: {scores[-1]}, teachers {[each.dev_score for each in record.teacher.rounds]}")
    first, second = np.mean(scores, axis=0)
    assert first > 0.65 and second > first - 0.05
