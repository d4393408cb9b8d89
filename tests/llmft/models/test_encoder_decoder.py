"""Encoder-decoder models against transformers' own forward, one prompt and one label word at a time."""

from __future__ import annotations

import dataclasses
import io

import pyarrow.parquet as parquet
import pytest
import torch
from support.small_models import CPU, ENCODER_DECODERS, save_model, t5_tokenizer, toy_text
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from llmft.config.patterns import Pattern, render_prompt
from llmft.data.task import NO_LABEL
from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.info import context_length, resolve_model
from llmft.models.loading import borrow_model, load_config, load_tokenizer
from llmft.models.scoring import label_word_scores
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.label_words import LabelWords, decoder_start, resolve_label_words
from llmft.prompting.tokenization import encode
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

each_family = pytest.mark.parametrize("family", ENCODER_DECODERS)
TEXTS = ["Today doctors saw lawyers.", "Soon a doctor will see the lawyers who saw a judge ?", "Yes", "doctors saw Yes or No?"]
WORDS = {"single": ("Yes", "No"), "several": ("Yes No", "doctors saw lawyers", "Yes")}


@pytest.fixture
def spec(refs, family, spec_of):
    return lambda method, **changed: spec_of(method, **{"model": refs[family]} | changed)


def borrowed(ref, precision: str = "fp32"):
    return borrow_model(ref, precision, torch.device("cpu"))


def resolved(ref, words) -> LabelWords:
    return resolve_label_words(load_tokenizer(ref), Pattern(template="{text} ?"), words, {"text": "a"}, in_decoder=True)


def batch_of(model, ref, words: LabelWords, indices=range(len(TEXTS))):
    tokenizer = load_tokenizer(ref)
    start = decoder_start(tokenizer, load_config(ref).decoder_start_token_id)
    queries = EncodedQueries(tuple(map(tuple, encode(tokenizer, TEXTS, closed=True))), (0,) * len(TEXTS), start)
    return make_batch(queries, list(indices), words, model)


@torch.no_grad()
def brute_force(network, tokenizer, prompt: str, words) -> tuple[list[float], list[bool]]:
    """The summed log-probability of each word's tokens, given as labels, and whether each of them is the best of all."""
    scores, best = [], []
    for word in words:
        labels = tokenizer(text_target=word, return_tensors="pt")["input_ids"]
        logits = network(**tokenizer(prompt, return_tensors="pt"), labels=labels).logits[0].log_softmax(-1)
        mine = [place for place, token in enumerate(labels[0].tolist()) if token not in tokenizer.all_special_ids]
        scores.append(float(sum(logits[place, labels[0, place]] for place in mine)))
        best.append(all(logits[place].argmax() == labels[0, place] for place in mine))
    return scores, best


@each_family
@pytest.mark.parametrize("kind", WORDS)
def test_scores_are_the_sums_of_log_probabilities(refs, family, kind):
    words, tokenizer = WORDS[kind], AutoTokenizer.from_pretrained(refs[family].path)
    network = AutoModelForSeq2SeqLM.from_pretrained(refs[family].path).eval()
    expected = torch.tensor([brute_force(network, tokenizer, text, words)[0] for text in TEXTS])
    assert expected.std(0).min() > 0.05
    ids = resolved(refs[family], words)
    assert ids.single == (kind == "single")
    with borrowed(refs[family]) as model, torch.no_grad():
        assert model.is_encoder_decoder and model.plain_head == (family != "t5")
        together = label_word_scores(model, batch_of(model, refs[family], ids)).labels
        alone = torch.cat([label_word_scores(model, batch_of(model, refs[family], ids, [i])).labels for i in range(len(TEXTS))])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=0)


@each_family
@pytest.mark.parametrize("method", ["zero_shot", "in_context"])
def test_a_trial_equals_one_prompt_at_a_time(spec, method):
    given = spec(method, separator=" ## ", n_test=8)
    result = run_trial(given, CPU)
    assert result.record.finished, result.record.message
    network = AutoModelForSeq2SeqLM.from_pretrained(given.model.path).eval()
    tokenizer, setting = AutoTokenizer.from_pretrained(given.model.path), prepare_trial(given)
    pattern, words = setting.task.patterns[given.pattern], setting.words.texts
    examples = {example.id: example for examples in (setting.draw.shots, *(t.examples for t in setting.tests)) for example in examples}
    shown = [(examples[id].fields, words[examples[id].label]) for id in result.record.draws.demonstrations]
    assert len(shown) == (16 if method == "in_context" else 0)
    rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
    assert len(rows) == 16
    seen = []
    for row in rows:
        prompt = render_prompt(pattern, shown, examples[row["id"]].fields, given.separator)
        scores, best = brute_force(network, tokenizer, prompt, words)
        expected = torch.tensor(scores).log_softmax(0)
        torch.testing.assert_close(torch.tensor(row["label_log_probabilities"]), expected, atol=1e-4, rtol=0)
        if (expected[0] - expected[1]).abs() > 2e-4:
            assert row["prediction"] == int(expected.argmax())
        assert row["free_prediction"] == (best.index(True) if any(best) else NO_LABEL)
        seen.append(expected[0] - expected[1])
    assert torch.stack(seen).std() > 0.05


def test_the_encoder_reads_each_query_once(refs):
    words = resolved(refs["flan"], WORDS["several"])
    with borrowed(refs["flan"]) as model, torch.no_grad():
        read = []
        model.network.get_encoder().register_forward_hook(lambda module, given, out: read.append(out.last_hidden_state.shape[0]))
        label_word_scores(model, batch_of(model, refs["flan"], words))
    assert read == [len(TEXTS)]


@pytest.mark.parametrize(("family", "start"), [("t5", (0,)), ("bart", (2, 0))])
def test_words_are_tokenised_alone_behind_the_decoders_start(refs, family, start):
    words, tokenizer = resolved(refs[family], ("Yes", "No")), load_tokenizer(refs[family])
    assert decoder_start(tokenizer, load_config(refs[family]).decoder_start_token_id) == start
    assert [tokenizer.decode(ids) for ids in words.ids] == ["Yes", "No"]
    assert words.ids[0] == tuple(tokenizer("Yes", add_special_tokens=False)["input_ids"])


def test_words_that_cannot_be_told_apart_or_are_unknown_are_refused(refs):
    for words, said in ((("Yes", " Yes"), "have the same tokens"), (("Yes", "ж"), "is unknown"), (("Yes", " "), "is unknown")):
        with pytest.raises(UserError, match=said):
            resolved(refs["t5"], words)


def test_relative_positions_have_no_bound(refs):
    assert load_config(refs["t5"]).n_positions == 16 and context_length(load_config(refs["t5"])) > 1 << 20
    assert context_length(load_config(refs["bart"])) == 512


def test_a_decoder_without_a_start_is_a_mistake_of_the_users(tmp_path, spec_of):
    tokenizer = t5_tokenizer(toy_text())
    folder = save_model(tmp_path / "t5", "t5", tokenizer)
    config = (tmp_path / "t5" / "config.json").read_text()
    (tmp_path / "t5" / "config.json").write_text(config.replace('"decoder_start_token_id": 0,', ""))
    record = run_trial(spec_of("zero_shot", model=resolve_model(folder)), CPU).record
    assert record.cause == "user_error" and "decoder_start_token_id" in record.message


@pytest.mark.parametrize("family", ["bart"])
def test_demonstrations_that_do_not_fit_the_encoder_are_dropped(spec):
    fitting = run_trial(spec("in_context"), CPU).record
    record = run_trial(spec("in_context", max_length=150), CPU).record
    assert fitting.draws.n_demonstrations_dropped == 0 and 0 < record.draws.n_demonstrations_dropped < 16
    assert record.cost.tokens_per_query <= 150


@each_family
@pytest.mark.parametrize("method", ["vanilla", "pattern", "lora"])
def test_training_lowers_the_loss(spec, method):
    rate = 1e-2 if method == "lora" else 3e-3
    record = run_trial(spec(method, learning_rate=rate, epochs=24, n_shots=8, n_dev=2, n_test=2), CPU).record
    assert record.finished, record.message
    assert record.curve[-1].train_loss < 0.7 * record.curve[0].train_loss


@pytest.mark.parametrize("family", ["flan"])
@pytest.mark.parametrize("changed", [{"micro_batch_tokens": 40}, {"gradient_checkpointing": True}, {"precision": "bf16"}], ids=str)
def test_how_it_is_computed_changes_little(spec, changed):
    runtime = dataclasses.replace(CPU, **{name: changed[name] for name in changed if name == "micro_batch_tokens"})
    spec_changes = {name: value for name, value in changed.items() if name != "micro_batch_tokens"}
    usual, other = (
        run_trial(spec("pattern", epsilon=1e-4, n_test=6, **changes), where).record
        for changes, where in (({}, CPU), (spec_changes, runtime))
    )
    assert other.finished, other.message
    tolerance = 0.05 if "precision" in changed else 1e-4
    assert [p.train_loss for p in other.curve] == pytest.approx([p.train_loss for p in usual.curve], rel=tolerance)


@each_family
def test_the_vanilla_head_reads_the_decoders_first_state(spec):
    given = spec("vanilla", settings={"head": "linear"}, n_test=6)
    setting, encoded = prepare_trial(given), encode_prompts(given, prepare_trial(given))
    with borrowed(given.model) as model, torch.no_grad():
        method = build_method("vanilla", given.settings)
        method.prepare(model, 2, torch.Generator().manual_seed(0))
        predictions = Evaluator(AdaptedModel(method, model), encoded, setting.words, CPU).predict("toy")
        start = torch.tensor([setting.model_info.decoder_prefix])
        for row, ids in zip(predictions.log_probabilities, encoded.sets["toy"].suffixes, strict=True):
            states = model.network.get_encoder()(torch.tensor([ids])).last_hidden_state
            last = model.network.get_decoder()(input_ids=start, encoder_hidden_states=states).last_hidden_state[0, -1]
            expected = (model.network.classifier.weight @ last).log_softmax(0)
            torch.testing.assert_close(torch.tensor(row), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["t5"])
def test_lora_adapts_the_papers_matrices(spec):
    cost = run_trial(spec("lora", settings={"r": 2}, epochs=1, n_test=2), CPU).record.cost
    assert cost.n_trainable_parameters == 2 * (2 * 32) * 2 * (2 + 4)  # q and v of 2 x self-attention, and 2 x self and cross


def test_it_generates_from_what_the_encoder_reads(refs):
    words = resolved(refs["flan"], WORDS["single"])
    with borrowed(refs["flan"]) as model, torch.no_grad():
        batch = batch_of(model, refs["flan"], words)
        together = model.network.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=4, do_sample=False)
        first = label_word_scores(model, batch)
        for place, text in enumerate(TEXTS):
            ids = load_tokenizer(refs["flan"])(text, return_tensors="pt")
            alone = model.network.generate(**ids, max_new_tokens=4, do_sample=False)[0]
            assert together[place, : len(alone)].tolist() == alone.tolist()
            expected = next((label for label, word in enumerate(words.ids) if word == (int(alone[1]),)), NO_LABEL)
            assert int(first.full_vocab[place]) == expected
