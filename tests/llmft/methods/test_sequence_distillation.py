"""Sequence-level distillation: what the teacher says, against plain transformers, and what the student learns of it."""

from __future__ import annotations

import gc
import io
import weakref
from dataclasses import replace

import pyarrow.parquet as parquet
import pytest
from support.plain_generation import plain_generate
from support.small_models import CPU, FLAN, save_model, t5_tokenizer, toy_text
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from llmft.config.spec import GenerationSpec
from llmft.errors import UserError
from llmft.evaluation import evaluator
from llmft.methods._registry import build_method
from llmft.models import loading as models
from llmft.models.info import resolve_model
from llmft.prompting.encoding import INPUTS, SHOTS
from llmft.prompting.tokenization import encode
from llmft.records.record_files import RESPONSES_FILE, read_record, write_record
from llmft.trial.distillation import run_teacher
from llmft.trial.export import export_model
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import check_spec, run_trial

DISTILLED = "sequence_distillation"


@pytest.fixture
def spec(spec_of):
    def make(settings=None, generation=None, **changed):
        usual = {"n_unlabelled": 7, "keep_unfinished": True}
        spec = GenerationSpec(**{"max_new_tokens": 5, "stop": ()} | (generation or {}))
        return spec_of(DISTILLED, usual | (settings or {}), **{"n_shots": 3, "n_dev": 2, "n_test": 4, "generation": spec} | changed)

    return make


@pytest.fixture
def teacher(tmp_path):
    """Another architecture with another tokenizer."""
    return resolve_model(save_model(tmp_path / "teacher", "t5", t5_tokenizer(toy_text()), **FLAN))


def taught(spec):
    """The setting after the lessons, and what the teacher left: its record and the table of its texts."""
    setting = prepare_trial(spec)
    teaching = run_teacher(spec, setting, encode_prompts(spec, setting), encode_teacher_prompts(spec, setting), CPU)
    return setting, teaching, parquet.read_table(io.BytesIO(teaching.responses)).to_pylist()


@pytest.mark.parametrize("context", ["demonstrations", "none"])
def test_responses_are_what_transformers_generates(spec, context):
    given = spec({"teacher_context": context, "instruction": "Say the first word twice."})
    setting, teaching, rows = taught(given)
    shown = {example.id: example for example in setting.draw.shots}
    assert sorted(teaching.teacher.demonstrations) == (sorted(shown) if context == "demonstrations" else [])
    opening = "Say the first word twice.\n\n"
    opening += "".join(f"{shown[id].fields['sentence']} ? {shown[id].references[0]}\n\n" for id in teaching.teacher.demonstrations)
    asked = setting.draw.unlabelled
    expected = plain_generate(given, [f"{opening}{example.fields['sentence']} ?" for example in asked])
    assert [row["response"] for row in rows] == expected and len(set(expected)) > 3
    assert [(row["id"], row["sentence"]) for row in rows] == [(example.id, example.fields["sentence"]) for example in asked]


def test_a_teacher_of_another_family_is_asked_in_its_own_tokens(spec, teacher):
    setting, teaching, rows = taught(spec({"teacher_context": "none"}, teacher=teacher))
    network, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(teacher.path).eval(), AutoTokenizer.from_pretrained(teacher.path)
    network.generation_config = GenerationConfig()
    for row, example in zip(rows, setting.draw.unlabelled, strict=True):
        inputs = tokenizer(f"{example.fields['sentence']} ?", return_tensors="pt", return_token_type_ids=False)
        config = GenerationConfig(max_new_tokens=5, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
        ids = network.generate(**inputs, generation_config=config)[0]
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len({row["response"] for row in rows}) > 3
    assert (teaching.teacher.model, teaching.teacher.zero_shot_dev_score) == ("teacher", None) and teaching.teacher.dev_score is not None


def test_the_students_targets_are_these_texts_and_the_end(spec, teacher):
    given = spec(teacher=teacher)
    setting, teaching, rows = taught(given)
    encoded, tokenizer = encode_prompts(given, setting, teaching.texts), setting.decoding.tokenizer
    queries = encoded.sets[SHOTS]
    assert len(queries) == teaching.teacher.n_responses == sum(row["trained_on"] for row in rows)
    by_prompt = dict(zip(queries.suffixes, queries.completions, strict=True))
    for row in (row for row in rows if row["trained_on"]):
        prompt, whole = encode(tokenizer, [f"{row['sentence']} ?", f"{row['sentence']} ? {row['response']}"])
        completion = by_prompt[tuple(prompt[len(encoded.prefix) :])]
        assert completion == (*whole[len(prompt) :], tokenizer.eos_token_id)


def test_references_of_unlabelled_inputs_are_nowhere(spec):
    given = spec()
    setting = prepare_trial(given)
    assert {(example.references, example.label) for example in setting.draw.unlabelled} == {((), None)}
    assert {queries.references for queries in (encode_teacher_prompts(given, setting)[0].sets[INPUTS],)} == {((),) * 7}
    assert not encode_prompts(given, setting).sets[SHOTS].completions
    record = run_trial(given, CPU).record
    assert record.draws.unlabelled == [example.id for example in setting.draw.unlabelled]


def test_an_answer_without_text_or_end_is_left_out_and_counted(spec, monkeypatch):
    usual = evaluator.generate

    def generate(model, batch, decoding):
        ids = usual(model, batch, decoding)
        ids[batch.indices == 1] = ids.new_tensor([2, 1, 1, 1, 1])  # nothing but the end
        ids[batch.indices == 2, 3:] = 2
        return ids

    monkeypatch.setattr(evaluator, "generate", generate)
    setting, teaching, rows = taught(spec({"keep_unfinished": False}))
    assert [row["finished"] for row in rows] == [place in (1, 2) for place in range(7)]
    assert [row["trained_on"] for row in rows] == [place == 2 for place in range(7)]
    assert (teaching.teacher.n_asked, teaching.teacher.n_responses, teaching.teacher.n_empty, teaching.teacher.n_unfinished) == (7, 1, 1, 5)
    assert list(teaching.texts) == [rows[2]["id"]]
    record = run_trial(spec({"keep_unfinished": False}), CPU).record
    assert {("poor_responses", "warning")} <= {(finding.code, finding.severity) for finding in record.findings}
    assert taught(spec())[1].teacher.n_responses == 6


def test_where_no_answer_can_be_trained_on_it_says_so(spec):
    record = run_trial(spec({"keep_unfinished": False}), CPU).record
    assert record.cause == "user_error" and "none of the 7 answers of small-opt is a text that came to its end" in record.message
    assert "\n" not in record.message


def test_shots_keep_their_own_references(spec):
    given = spec({"train_on_shots": True})
    setting, teaching, _ = taught(given)
    queries = encode_prompts(given, setting, teaching.texts).sets[SHOTS]
    assert len(queries) == teaching.teacher.n_responses + 3
    assert queries.references[-3:] == tuple(shot.references for shot in setting.draw.shots)


def test_the_responses_lie_beside_the_record(spec, tmp_path):
    result = run_trial(spec(), CPU)
    write_record(tmp_path, result.record, result.predictions, responses=result.responses)
    assert read_record(tmp_path).responses_sha256
    rows = parquet.read_table(tmp_path / RESPONSES_FILE).to_pylist()
    assert [row["id"] for row in rows] == result.record.draws.unlabelled
    assert result.record.teacher.n_asked == 7 and result.record.cost.tokens_teacher > 0


def test_the_teacher_is_gone_before_the_training(spec, teacher, monkeypatch):
    networks, real = [], models._load_base
    monkeypatch.setattr(models, "_BASE", {})  # other tests may have left the teacher there

    def load(ref, dropout, base_weights):
        found = real(ref, dropout, base_weights)
        if ref == teacher:
            networks.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(models, "_load_base", load)
    taught(spec(teacher=teacher))
    gc.collect()
    assert len(networks) == 1 and networks[0]() is None
    assert not any(key[2] == teacher.fingerprint for key in models._BASE)


def test_small_passes_change_neither_responses_nor_training(spec):
    first, second = (run_trial(spec(epsilon=1e-4), replace(CPU, micro_batch_tokens=n)) for n in (16384, 30))
    assert first.responses == second.responses
    losses = [[point.train_loss for point in result.record.curve] for result in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"student": "vanilla"}, "a method that generates text"), ({"student": "in_context"}, "another method that trains"),
     ({"student": "finetuned_in_context"}, "a student reads the query alone"), ({"student_settings": {"r": 2}}, "r"),
     ({"n_unlabelled": 0}, "n_unlabelled")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        build_method(DISTILLED, settings)


def test_a_task_with_labels_is_refused(spec):
    with pytest.raises(UserError, match="is for generation, and the task 'toy' for classification"):
        check_spec(spec().model_copy(update={"task": "toy", "generation": None}))


def test_a_student_learns_from_a_tuned_teacher_what_it_could_not_do(spec_of, tmp_path):
    usual = {"model": resolve_model("toy"), "task": "toy_text", "n_dev": 8, "n_test": 48, "learning_rate": 1e-3, "selections": ("last",)}
    usual |= {"generation": GenerationSpec(max_new_tokens=8), "eval_every_epochs": 100}
    tuned_spec = spec_of("pattern", n_shots=64, epochs=30, batch_size=16, **usual)
    tuned = run_trial(tuned_spec, replace(CPU, keep_weights=True))
    export_model(tuned_spec, tuned.weights, tmp_path / "tuned")
    given = spec_of(
        DISTILLED, {"teacher_context": "none", "n_unlabelled": 96, "keep_unfinished": False},
        teacher=resolve_model(str(tmp_path / "tuned")),
        n_shots=2, epochs=16, batch_size=16, **usual,
    )  # fmt: skip
    record = run_trial(given, CPU).record
    assert record.finished, record.message
    zero_shot = run_trial(spec_of("zero_shot", n_shots=0, **usual | {"selections": ("none",)}), CPU).record
    assert zero_shot.metrics["none"]["toy_text"].exact_match == 0
    assert record.metrics["last"]["toy_text"].exact_match > 0.5  # a constant answer gets a quarter
    assert record.teacher.n_responses > 90 and record.teacher.dev_score > 0.5
