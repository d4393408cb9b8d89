from __future__ import annotations

import gc
import io
import weakref
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from support.small_models import CPU, byte_level_tokenizer, save_model, toy_text
from support.teachers import logits_of, losses, prompts_of, teacher_logits, teaching, word_ids
from transformers import AutoModelForCausalLM

from llmft.config.spec import TrainSpec, TrialSpec
from llmft.data.sampling import DrawRequest, draw_examples, draw_unlabelled
from llmft.data.task import NO_LABEL, Example, TaskData
from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._recipe import TrialContext
from llmft.methods._registry import METHODS, build_method, complete_settings, method_class
from llmft.methods.context_distillation import probability_of_beginnings
from llmft.models import loading as models
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model
from llmft.prompting.encoding import DEV, INPUTS, SHOTS
from llmft.prompting.label_words import LabelWords
from llmft.tasks._registry import load_task
from llmft.trial.distillation import run_teacher
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import run_trial
from llmft.trial.weights import restored

DISTILLED = "context_distillation"
FEW = {"n_unlabelled": 12}
NOTES = {"n_unlabelled": 0, "distil_shots": True, "cross_entropy_weight": 0.5}


# --- what the teacher reads and says


@pytest.mark.parametrize("instruction", ["", "Does the first sentence entail the second?"])
def test_targets_are_what_transformers_says_to_the_whole_prompt(spec_of, instruction):
    spec = spec_of(DISTILLED, {**FEW, "instruction": instruction}, n_shots=8)
    setting, _, (lesson,), _ = teaching(spec)
    assert len(lesson.prefix) > 50, "the demonstrations are encoded once"
    logits = logits_of(spec.model.path, prompts_of(spec, setting, lesson.demonstrations, setting.draw.unlabelled, instruction))
    expected = log_softmax(logits[:, word_ids(setting)], axis=1)
    np.testing.assert_allclose(setting.method.teacher_targets["outcomes"][:, 0], expected, atol=2e-5)
    assert expected.std(0).min() > 0.01


def test_the_teacher_reads_what_in_context_learning_does(spec_of):
    setting, _, (lesson,), teacher = teaching(spec_of(DISTILLED, FEW, order_seed=3))
    in_context = run_trial(spec_of("in_context", order_seed=3, selections=("none",)), CPU).record
    assert [example.id for example in lesson.demonstrations] == teacher.demonstrations == in_context.draws.demonstrations
    assert (teacher.dev_score, teacher.zero_shot_dev_score) == (
        in_context.dev_score["none"],
        run_trial(spec_of("zero_shot", n_shots=0, selections=("none",)), CPU).record.dev_score["none"],
    )
    assert {example.id for example in setting.draw.unlabelled}.isdisjoint(teacher.demonstrations)


@pytest.mark.parametrize("over", ["vocabulary", "top_k"])
def test_targets_over_words_with_a_temperature(spec_of, over):
    spec = spec_of(DISTILLED, {**FEW, "over": over, "k": 20, "temperature": 2.0}, n_shots=4)
    setting, _, (lesson,), _ = teaching(spec)
    taught, prompts = setting.method.teacher_targets, prompts_of(spec, setting, lesson.demonstrations, setting.draw.unlabelled)
    expected = softmax(logits_of(spec.model.path, prompts) / 2, axis=1)
    if over == "top_k":
        best = np.sort(expected, axis=1)[:, ::-1][:, :20]
        expected = np.concatenate([best, 1 - best.sum(1, keepdims=True)], axis=1)
    assert taught["outcomes"].shape == (12, 1, expected.shape[1])
    np.testing.assert_allclose(taught["outcomes"][:, 0].exp(), expected, atol=1e-5)
    assert (taught["reached"] == 1).all()


@pytest.mark.parametrize("context", ["demonstrations", "shuffled_labels"])
@pytest.mark.parametrize("n_unlabelled", [0, 5])
def test_no_shot_stands_in_the_prompt_in_which_it_is_asked(spec_of, context, n_unlabelled):
    setting = prepare_trial(spec_of(DISTILLED, {**NOTES, "n_unlabelled": n_unlabelled, "teacher_context": context}, n_shots=8))
    inputs, asked = setting.training_examples, []
    for lesson in setting.recipe.teacher.prompts:
        asked += lesson.examples
        assert {inputs[i].id for i in lesson.examples}.isdisjoint(example.id for example in lesson.demonstrations)
        labels = [example.label for example in lesson.demonstrations]
        assert labels.count(0) == labels.count(1) == (len(labels) // 2), "what is missing must not tell the label"
        assert len(labels) == (8 if set(lesson.examples) <= set(range(n_unlabelled)) else 6)
    assert sorted(asked) == list(range(n_unlabelled + 8))


def test_the_teacher_of_a_shot_says_the_same_whatever_its_label_is(spec_of):
    """A label that reached the teacher would change what it says."""
    spec = spec_of(DISTILLED, NOTES, n_shots=8)
    setting, encoded, _, _ = teaching(spec)
    other = prepare_trial(spec)
    swapped = tuple(replace(shot, label=1 - shot.label) if i in (0, 1) else shot for i, shot in enumerate(other.draw.shots))
    draw = replace(other.draw, shots=swapped)
    other = replace(other, draw=draw, recipe=other.method.recipe(TrialContext(spec, draw)))
    run_teacher(spec, other, encoded, encode_teacher_prompts(spec, other), CPU)
    first, second = setting.method.teacher_targets["outcomes"], other.method.teacher_targets["outcomes"]
    torch.testing.assert_close(first[:2], second[:2], atol=0, rtol=0)
    assert (first[2:] - second[2:]).abs().max() > 1e-3, "it shows to the others"


def test_unlabelled_inputs_have_no_label_anywhere(spec_of):
    spec = spec_of(DISTILLED, FEW)
    setting = prepare_trial(spec)
    assert set(encode_prompts(spec, setting).sets[SHOTS].labels) == {NO_LABEL}
    assert {label for lesson in encode_teacher_prompts(spec, setting) for label in lesson.sets[INPUTS].labels} == {NO_LABEL}
    record = run_trial(spec, CPU).record
    assert record.draws.unlabelled == [example.id for example in setting.draw.unlabelled]
    assert len(record.draws.shots) == 16


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_shuffled_labels_are_all_wrong_and_still_balanced(spec_of, n_labels):
    pool = tuple(Example(str(i), {}, i % n_labels) for i in range(100 * n_labels))
    data = TaskData(pool, ())
    draw = draw_unlabelled(data, draw_examples(data, tuple(map(str, range(n_labels))), DrawRequest(4, "per_class", 0, 0)), 7, 0)
    method = build_method(DISTILLED, {"n_unlabelled": 7, "teacher_context": "shuffled_labels"})
    (lesson,) = method.teacher_prompts(TrialContext(spec_of(DISTILLED), draw))
    assert [example.id for example in lesson.demonstrations] == [example.id for example in draw.shots]
    assert all(shown.label != shot.label for shown, shot in zip(lesson.demonstrations, draw.shots, strict=True))
    labels = [example.label for example in lesson.demonstrations]
    assert {labels.count(label) for label in range(n_labels)} == {4}


# --- the loss


@pytest.mark.parametrize("over", ["label_words", "vocabulary", "top_k"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_by_hand(spec_of, over, temperature):
    spec = spec_of(DISTILLED, {**FEW, "over": over, "k": 10, "temperature": temperature}, n_shots=4)
    whole, each, student, setting = losses(spec)
    teacher = teacher_logits(spec, setting)
    if over == "label_words":
        teacher, student = teacher[:, word_ids(setting)], student[:, word_ids(setting)]
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    if over == "top_k":
        best = np.argsort(-p, axis=1)[:, :10]
        p, q = (np.take_along_axis(x, best, 1) for x in (p, q))
        p, q = (np.c_[x, 1 - x.sum(1)] for x in (p, q))
    expected = temperature**2 * np.array([entropy(a, b) for a, b in zip(p, q, strict=True)])
    np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-6)
    assert whole == pytest.approx(expected.mean(), rel=1e-3)


@pytest.mark.parametrize("over", ["label_words", "vocabulary"])
def test_pseudo_labels_are_the_teachers_best(spec_of, over):
    spec = spec_of(DISTILLED, {**FEW, "over": over, "distance": "pseudo_labels"}, n_shots=4)
    _, each, student, setting = losses(spec)
    said = teacher_logits(spec, setting)[:, word_ids(setting)].argmax(1)
    words = (
        log_softmax(student[:, word_ids(setting)], axis=1) if over == "label_words" else log_softmax(student, axis=1)[:, word_ids(setting)]
    )
    np.testing.assert_allclose(each, -words[np.arange(12), said], rtol=1e-3)
    assert set(said) == {0, 1}


def test_the_weighted_cross_entropy_reads_the_labels_of_shots_alone(spec_of):
    spec = spec_of(DISTILLED, {"n_unlabelled": 6, "distil_shots": True, "cross_entropy_weight": 0.3}, n_shots=4)
    whole, each, student, setting = losses(spec)
    teacher, own = teacher_logits(spec, setting)[:, word_ids(setting)], student[:, word_ids(setting)]
    apart = np.array([entropy(a, b) for a, b in zip(softmax(teacher, axis=1), softmax(own, axis=1), strict=True)])
    gold = [shot.label for shot in setting.draw.shots]
    right = -log_softmax(own, axis=1)[6 + np.arange(4), gold]
    assert whole == pytest.approx(0.7 * apart.mean() + 0.3 * right.mean(), rel=1e-3)
    np.testing.assert_allclose(each[:6], 0.7 * apart[:6], rtol=1e-3)  # one at a time, in which the mean over all is the same
    assert np.mean(each) == pytest.approx(whole, rel=1e-5)


def test_words_of_several_tokens_are_weighed_by_how_the_teacher_comes_to_them():
    """KL of the distributions over whole words and all else that may begin like one, by the chain rule."""
    words = LabelWords(("a", "b", "c"), ((7, 9, 12), (8,), (7, 5)))
    assert words.continuation_prefixes == ((), (7,), (7, 9))
    log_p = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    reached = probability_of_beginnings(log_p, words)
    torch.testing.assert_close(reached[:, 0], torch.ones(4))
    torch.testing.assert_close(reached[:, 1], log_p[:, 0, 7].exp())
    torch.testing.assert_close(reached[:, 2], (log_p[:, 0, 7] + log_p[:, 1, 9]).exp())


# --- the training


def test_a_gradient_flows_into_the_student_alone_and_the_teacher_has_no_dropout(tmp_path, spec_of, tokenizer):
    ref = resolve_model(save_model(tmp_path / "dropping", "opt", tokenizer, std=0.2, dropout=0.5))
    spec = spec_of(DISTILLED, FEW, model=ref, n_shots=4)
    setting, encoded, (lesson,), _ = teaching(spec)
    assert not any(values.requires_grad for values in setting.method.teacher_targets.values())
    logits = logits_of(ref.path, prompts_of(spec, setting, lesson.demonstrations, setting.draw.unlabelled))
    np.testing.assert_allclose(
        setting.method.teacher_targets["outcomes"][:, 0], log_softmax(logits[:, word_ids(setting)], axis=1), atol=2e-5
    )
    with borrow_model(ref, "fp32", torch.device("cpu")) as student:
        setting.method.prepare(student, 2, torch.Generator().manual_seed(0))
        student.network.train()
        batch = make_batch(encoded.sets[SHOTS], [0, 1], setting.words, student)
        first, second = (setting.method.loss(student, batch) for _ in range(2))
        assert first != second, "the student's own dropout is on"
        first.backward()
        assert all(parameter.grad is not None for parameter in student.network.model.decoder.layers.parameters())
    base, _ = models._load_base(ref, None)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())


def test_the_teacher_reads_everything_once(spec_of, monkeypatch):
    seen, real = [], AdaptedModel.forward

    def forward(self, compute, given):
        seen.append(compute.__name__)
        return real(self, compute, given)

    monkeypatch.setattr(AdaptedModel, "forward", forward)
    spec = spec_of(DISTILLED, FEW, epochs=3)
    record = run_trial(spec, CPU).record
    assert (seen.count("targets"), seen.count("encode_shared"), seen.count("loss")) == (1, 1, 6)
    assert "targets" not in seen[seen.index("loss") :]
    setting = prepare_trial(spec)
    encoded, (lesson,) = encode_prompts(spec, setting), encode_teacher_prompts(spec, setting)

    def n_tokens(sets) -> int:
        return sum(len(ids) for queries in sets for ids in queries.suffixes)

    alone = len(encoded.prefix) * len(encoded.sets[DEV]) + n_tokens([encoded.sets[DEV]])
    expected = len(lesson.prefix) + n_tokens(lesson.sets.values()) + alone
    assert record.teacher.n_tokens == record.cost.tokens_teacher == expected
    without = record.cost.flops - 2.0 * record.teacher.n_parameters * expected
    assert without == pytest.approx(record.cost.n_parameters * (6 * record.cost.tokens_trained + 2 * record.cost.tokens_evaluated))


def test_small_passes_change_no_answer(spec_of):
    spec = spec_of(DISTILLED, {"n_unlabelled": 10, "distil_shots": True, "cross_entropy_weight": 0.5}, n_shots=6, epsilon=1e-4)
    first, second = (run_trial(spec, replace(CPU, micro_batch_tokens=n)).record for n in (16384, 60))
    assert [p.train_loss for p in first.curve] == pytest.approx([p.train_loss for p in second.curve], abs=1e-4)


# --- a larger teacher


def test_a_larger_teacher_is_asked_and_gone_before_the_training(tmp_path, spec_of, tokenizer, monkeypatch):
    larger = resolve_model(save_model(tmp_path / "larger", "opt", tokenizer, seed=5, width=64, std=0.2))
    spec = spec_of(DISTILLED, {**FEW, "over": "vocabulary"}, teacher=larger, n_shots=4)
    networks, real = [], models._load_base
    monkeypatch.setattr(models, "_BASE", {})  # other tests may have left the teacher there

    def load(ref, dropout, base_weights):
        found = real(ref, dropout, base_weights)
        if ref == larger:
            networks.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(models, "_load_base", load)
    setting, _, (lesson,), teacher = teaching(spec)
    gc.collect()
    assert len(networks) == 1 and networks[0]() is None
    assert not any(key[2] == larger.fingerprint for key in models._BASE)
    assert teacher.model == "larger" and teacher.n_parameters > 64 * 600
    logits = logits_of(larger.path, prompts_of(spec, setting, lesson.demonstrations, setting.draw.unlabelled))
    np.testing.assert_allclose(setting.method.teacher_targets["outcomes"][:, 0], log_softmax(logits, axis=1), atol=2e-4)
    record = run_trial(spec, CPU).record
    assert record.finished and record.teacher.model == "larger"
    assert record.cost.n_parameters < record.teacher.n_parameters


def test_a_teacher_with_padding_in_its_vocabulary(tmp_path, spec_of, tokenizer):
    from transformers import AutoConfig

    folder = save_model(tmp_path / "padded", "opt", tokenizer, seed=5, std=0.2)
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.resize_token_embeddings(len(tokenizer) + 40)
    network.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).vocab_size == len(tokenizer) + 40
    for over in ("vocabulary", "top_k"):
        spec = spec_of(DISTILLED, {**FEW, "over": over}, teacher=resolve_model(folder), n_shots=4)
        record = run_trial(spec, CPU).record
        assert record.finished, record.message


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, spec_of):
    other = resolve_model(save_model(tmp_path / "other", "opt", byte_level_tokenizer(toy_text(), 500)))
    record = run_trial(spec_of(DISTILLED, FEW, teacher=other), CPU).record
    assert record.cause == "user_error" and "tokenizers of other and small-opt differ" in record.message
    record = run_trial(spec_of("pattern", teacher=other), CPU).record
    assert record.cause == "user_error" and "'pattern' learns from no teacher" in record.message


# --- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_unlabelled": 0}, "nothing to train on"),
        ({"cross_entropy_weight": 0.5}, "needs labelled inputs"),
        ({"student": "zero_shot"}, "another method that trains"),
        ({"student": "context_distillation"}, "another method that trains"),
        ({"student": "finetuned_in_context"}, "reads demonstrations: use pattern"),
        ({"student": "regularised", "student_settings": {"penalty": "kl_to_base"}}, "use l2_sp"),
        ({"student": "lora", "student_settings": {"ranks": 4}}, "unknown key 'ranks'"),
        ({"student": "vanilla", "over": "vocabulary"}, "'vanilla' has a head of its own"),
        ({"distance": "pseudo_labels", "over": "top_k"}, "label_words or vocabulary"),
        ({"teacher_context": "instruction"}, "needs an instruction"),
        ({"teacher_context": "none", "instruction": "Answer."}, "without context has none"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(UserError) as raised:
        build_method(DISTILLED, settings)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_one_shot_of_each_label_cannot_be_its_own_demonstration(spec_of):
    record = run_trial(spec_of(DISTILLED, NOTES, n_shots=2), CPU).record
    assert record.cause == "user_error" and "n_shots" in record.message
    assert run_trial(spec_of(DISTILLED, FEW, n_shots=2), CPU).record.finished


def test_a_students_settings_are_complete():
    settings = complete_settings(DISTILLED, {"student": "lora", "student_settings": {"r": 4}})
    assert settings["student_settings"] == complete_settings("lora", {"r": 4})


@pytest.mark.parametrize(
    "settings",
    [{"distance": "js"}, {"distance": "mse"}, {"distance": "l1"}, {"student": "lora"}, {"student": "vanilla"}, NOTES,
     {"teacher_context": "instruction", "instruction": "Say Yes or No."}, {"teacher_context": "none", "distil_shots": True}],
    ids=str,
)  # fmt: skip
def test_every_kind_trains(spec_of, settings):
    record = run_trial(spec_of(DISTILLED, FEW | settings, n_dev=0, selections=("last",), n_shots=4), CPU).record
    assert record.finished, record.message
    assert record.curve[-1].train_loss < record.curve[0].train_loss or settings.get("teacher_context") == "none"
    assert record.teacher.dev_score is None


# --- students

STUDENTS = ("adapter_pfeiffer", "bitfit", "lora", "p_tuning", "pattern", "prefix_tuning", "prompt_tuning", "qlora", "vanilla")


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_is_what_it_is_alone(spec_of, wide_opt, tmp_path, student):
    """Prepared, conditioned, folded and kept as without a teacher; and its kept weights give the trial's predictions again."""
    if method_class(student).base_weights != "fp32":
        pytest.importorskip("bitsandbytes")
    keeping = replace(CPU, keep_weights=True)
    settings = FEW | {"student": student, "distil_shots": True, "cross_entropy_weight": 0.3}
    spec = spec_of(DISTILLED, settings, model=wide_opt, n_shots=4, selections=("last",))
    result, alone = (run_trial(each, keeping) for each in (spec, spec_of(student, model=wide_opt, n_shots=4, selections=("last",))))
    assert result.record.finished, result.record.message
    kept, expected = load(result.weights), load(alone.weights)
    assert {name: tensor.shape for name, tensor in kept.items()} == {name: tensor.shape for name, tensor in expected.items()}
    ours, theirs = result.record.cost, alone.record.cost
    assert (ours.n_trainable_parameters, ours.tokens_per_query) == (theirs.n_trainable_parameters, theirs.tokens_per_query)
    assert len(result.record.virtual_tokens) == len(alone.record.virtual_tokens)
    (tmp_path / "weights").write_bytes(result.weights)
    setting, rows = prepare_trial(spec), parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    with restored(spec, tmp_path / "weights", torch.device("cpu")) as adapted:
        again = Evaluator(adapted, encode_prompts(spec, setting), setting.words, CPU).predict("toy").log_probabilities
    found = np.array([row["label_log_probabilities"] for row in rows if row["set"] == "toy"])
    np.testing.assert_allclose(again, found, atol=1e-4)


def test_every_method_that_trains_is_a_student_or_refused():
    names = {name for name in METHODS if method_class(name).trains}
    refused = {name for name in names if not _builds(name)}
    by_students = {DISTILLED, "sequence_distillation", "multi_task", "rationale_tuning"}
    assert refused == by_students | {"finetuned_in_context"} and names - refused >= set(STUDENTS)


def _builds(student: str) -> bool:
    try:
        return bool(build_method(DISTILLED, {"student": student}))
    except UserError:
        return False


@pytest.mark.parametrize("penalty", ["l2_sp", "ewc"])
def test_a_student_is_held_near_its_start(spec_of, penalty):
    """With a Fisher information of what it is trained on, unlabelled examples included."""
    records = []
    for strength in (0.0, 100.0):
        student = {"student": "regularised", "student_settings": {"penalty": penalty, "strength": strength, "n_fisher_samples": 5}}
        records.append(run_trial(spec_of(DISTILLED, FEW | student, epochs=6), CPU).record)
    free, held = records
    assert 0 < held.weight_distance["last"] < 0.8 * free.weight_distance["last"]
    assert (held.cost.tokens_trained > free.cost.tokens_trained) == (penalty == "ewc")


# --- the toy task


def accuracy(method: str, settings: dict, seed: int) -> float:
    spec = TrialSpec(
        model=resolve_model("toy"), task="toy", data=load_task("toy").resolve_data(None), method=method, n_dev=0, test_sets=("toy",),
        n_shots=0 if method == "zero_shot" else 16, n_test=200, settings=complete_settings(method, settings), selections=("last",),
        train=TrainSpec(learning_rate=1e-3, epochs=10),
    )  # fmt: skip
    record = run_trial(spec.with_seed(seed), CPU).record
    assert record.finished, record.message
    (by_set,) = record.metrics.values()
    return by_set["toy"].accuracy


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_the_student_has_most_of_what_the_prompt_gives_and_that_of_a_teacher_without_one_has_not(seed):
    zero_shot, prompted = accuracy("zero_shot", {}, seed), accuracy("in_context", {}, seed)
    student, control = (
        accuracy(DISTILLED, {"n_unlabelled": 256, "teacher_context": context}, seed) for context in ("demonstrations", "none")
    )
    print(f"seed {seed}: zero-shot {zero_shot:.3f}, prompted {prompted:.3f}, student {student:.3f}, control {control:.3f}")
    assert prompted > zero_shot + 0.2
    assert student - zero_shot >= 0.8 * (prompted - zero_shot)
    assert control - zero_shot < 0.2 * (prompted - zero_shot)
