"""Prompt tuning, P-tuning and prefix tuning against transformers and peft, one unpadded query at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save_file
from support.small_models import CPU, FLAN, config, network, save_model, t5_tokenizer, toy_text
from transformers import AutoModelForCausalLM, DynamicCache

from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.methods.modules.soft_prompt import sample_tokens
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.info import resolve_model
from llmft.models.loading import LoadedModel, _has_plain_head, borrow_model, load_tokenizer
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.label_words import LabelWords
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

N_WORDS, K = 90, 4
QUERIES = tuple(tuple((7 * i + 3 * j) % N_WORDS for j in range(length)) for i, length in enumerate((3, 11, 1, 8, 20)))
SINGLE = LabelWords(("a", "b", "c"), ((7,), (8,), (33,)))
SEVERAL = LabelWords(("a", "b", "c"), ((7, 9, 12), (8,), (7, 5)))
FAMILIES = {
    "opt": {}, "opt, embedded narrow": {"word_embed_proj_dim": 16}, "gpt2": {}, "gpt_neox": {}, "llama": {}, "bloom": {},
    "mistral": {}, "gemma2": {"final_logit_softcapping": 3.0},
}  # fmt: skip
METHODS = {
    "prompt_tuning": {}, "p_tuning": {"encoder_width": 9}, "lstm": {"encoder": "lstm", "encoder_width": 9},
    "prefix_tuning": {}, "reparametrised": {"reparametrise": True, "encoder_width": 9},
}  # fmt: skip
NAMES = {"lstm": "p_tuning", "reparametrised": "prefix_tuning"}


def tiny(family: str) -> torch.nn.Module:
    name, changed = family.split(",")[0], dict(FAMILIES[family])
    made = config(name, N_WORDS, **{key: value for key, value in changed.items() if key != "word_embed_proj_dim"})
    made.update(changed)
    return network(made)


def adapted(kind: str, net: torch.nn.Module, **settings) -> AdaptedModel:
    """With learned vectors that are no longer what they began as, and large enough to matter."""
    method = build_method(NAMES.get(kind, kind), {"n_virtual_tokens": K} | METHODS[kind] | settings)
    model = LoadedModel(net, torch.device("cpu"), "fp32", _has_plain_head(net))
    method.prepare(model, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in net.soft_prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return AdaptedModel(method, model).eval()


def forward(kind: str, net: torch.nn.Module, vectors: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[length of the text, vocabulary]: transformers' logits for one text without padding, mask or positions."""
    text = torch.tensor([ids])
    if NAMES.get(kind, kind) != "prefix_tuning":
        embeddings = torch.cat([vectors[None], net.get_input_embeddings()(text)], 1)
        return net(inputs_embeds=embeddings, use_cache=False).logits[0, K:]
    cache = DynamicCache()
    net.base_model(input_ids=torch.tensor([[5] * K]), past_key_values=cache, use_cache=True)  # for its shape alone
    rows = vectors.view(K, len(cache.layers), 2, *cache.layers[0].keys.shape[1::2])
    pairs = [(rows[:, i, 0].transpose(0, 1)[None], rows[:, i, 1].transpose(0, 1)[None]) for i in range(len(cache.layers))]
    return net(input_ids=text, past_key_values=DynamicCache(pairs), use_cache=True).logits[0]


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
@torch.no_grad()
def test_scores_of_a_padded_batch_are_those_of_one_query_at_a_time(kind, family, words):
    net = tiny(family)
    ours = adapted(kind, net)
    vectors, expected = ours(ours.method.soft_prompt), []
    for query in QUERIES:
        logits = [forward(kind, net, vectors, [*query, *ids]).log_softmax(-1) for ids in words.ids]
        expected.append(
            [sum(row[len(query) - 1 + i, token] for i, token in enumerate(ids)) for row, ids in zip(logits, words.ids, strict=True)]
        )
    batch = make_batch(EncodedQueries(QUERIES, (0,) * len(QUERIES)), range(len(QUERIES)), words, ours.model)
    found, expected = ours(ours.method.scores, batch).labels, torch.tensor(expected)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    plain = build_method("zero_shot", {}).scores(ours.model, batch).labels
    assert (plain - expected).abs().max(1).values.min() > 0.01, "a prompt that changes nothing cannot show a mistake"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", ["opt", "opt, embedded narrow", "gpt_neox", "llama"])
@torch.no_grad()
def test_peft_reads_what_was_learned_and_gives_the_same_logits(tmp_path, kind, family):
    net = tiny(family)
    net.save_pretrained(tmp_path / "base")
    ours = adapted(kind, net)
    vectors = ours(ours.method.soft_prompt).clone()
    ours.method.finalize(ours)
    assert torch.equal(ours(ours.method.soft_prompt), vectors)
    peft_config, state = ours.method.export(ours.model)
    peft_config.save_pretrained(tmp_path / "adapter")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    logits = theirs(input_ids=torch.tensor([QUERIES[3]]), attention_mask=torch.ones(1, len(QUERIES[3]), dtype=torch.long)).logits[0]
    torch.testing.assert_close(logits[-len(QUERIES[3]) :], forward(kind, net, vectors, list(QUERIES[3])), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize(("family", "changed"), [("t5", {}), ("t5", FLAN), ("bart", {})], ids=["t5", "flan", "bart"])
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "lstm"])
@torch.no_grad()
def test_an_encoder_reads_the_prompt_in_front_of_the_query(kind, family, changed, words):
    net = network(config(family, N_WORDS, **changed))
    ours, start, expected = adapted(kind, net), net.config.decoder_start_token_id, []
    for query in QUERIES:
        read = torch.cat([ours(ours.method.soft_prompt)[None], net.get_input_embeddings()(torch.tensor([query]))], 1)
        said = [net(inputs_embeds=read, decoder_input_ids=torch.tensor([[start, *ids[:-1]]])).logits[0] for ids in words.ids]
        expected.append(
            [
                sum(row[i, token] for i, token in enumerate(ids))
                for row, ids in zip((logits.log_softmax(-1) for logits in said), words.ids, strict=True)
            ]
        )
    batch = make_batch(EncodedQueries(QUERIES, (0,) * len(QUERIES), (start,)), range(len(QUERIES)), words, ours.model)
    torch.testing.assert_close(ours(ours.method.scores, batch).labels, torch.tensor(expected), atol=5e-5, rtol=0)
    plain = build_method("zero_shot", {}).scores(ours.model, batch).labels
    assert (plain - torch.tensor(expected)).abs().max(1).values.min() > 0.01


def test_a_prefix_for_an_encoder_is_refused_in_one_line(tmp_path, spec_of):
    ref = resolve_model(save_model(tmp_path / "t5", "t5", t5_tokenizer(toy_text())))
    for name, settings in (("prefix_tuning", {}), ("context_distillation", {"student": "prefix_tuning"})):
        record = run_trial(spec_of(name, settings, model=ref), CPU).record
        assert record.cause == "user_error" and "Use prompt_tuning" in record.message and "\n" not in record.message
    record = run_trial(spec_of("prompt_tuning", {"n_virtual_tokens": 3}, model=ref), CPU).record
    assert record.finished and record.cost.n_trainable_parameters == 3 * 32, record.message


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_of_a_padded_batch_are_the_mean_over_single_queries(kind):
    ours = adapted(kind, tiny("llama"))
    queries = EncodedQueries(QUERIES, (0, 1, 2, 1, 0))

    def gradients(groups):
        for parameter in ours.network.soft_prompt.parameters():
            parameter.grad = None
        for group in groups:
            (ours(ours.method.loss, make_batch(queries, group, SINGLE, ours.model)) * len(group) / len(QUERIES)).backward()
        return [parameter.grad for parameter in ours.network.soft_prompt.parameters()]

    together, alone = gradients([[0, 1, 2, 3, 4]]), gradients([[i] for i in range(5)])
    assert all(gradient.abs().max() > 0 for gradient in together)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing_and_a_prefix_refuses_it(spec_of):
    curves = [run_trial(spec_of("prompt_tuning", gradient_checkpointing=on, n_test=4), CPU).record.curve for on in (True, False)]
    assert [point.train_loss for point in curves[0]] == pytest.approx([point.train_loss for point in curves[1]], abs=1e-5)
    record = run_trial(spec_of("prefix_tuning", gradient_checkpointing=True), CPU).record
    assert record.cause == "user_error" and "gradient_checkpointing" in record.message and "\n" not in record.message


def begins_as(spec) -> tuple[torch.Tensor, torch.Tensor]:
    """The soft prompt at the start, and the embeddings of the words."""
    setting = prepare_trial(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        setting.method.prepare(model, 2, torch.Generator().manual_seed(0))
        return model.network.soft_prompt().detach(), model.network.get_input_embeddings().weight


def test_where_a_prompt_begins(spec_of):
    tokenizer = load_tokenizer(spec_of().model)
    text = tokenizer("Yes or No", add_special_tokens=False)["input_ids"]
    assert 1 < len(text) < 5
    vectors, words = begins_as(spec_of("prompt_tuning", {"n_virtual_tokens": 5, "initialisation": "text", "text": "Yes or No"}))
    assert torch.equal(vectors, words[(text * 5)[:5]])
    vectors, _ = begins_as(spec_of("prompt_tuning", {"n_virtual_tokens": 1, "initialisation": "text", "text": "Yes or No"}))
    assert torch.equal(vectors, words[text[:1]])
    spec = spec_of("prompt_tuning", {"n_virtual_tokens": 5, "initialisation": "labels"})
    vectors, _ = begins_as(spec)
    for vector, ids in zip(vectors, prepare_trial(spec).words.ids, strict=False):
        torch.testing.assert_close(vector, words[list(ids)].mean(0))
    for n, n_different in ((5, 5), (700, len(words) - len(set(tokenizer.all_special_ids)))):
        vectors, _ = begins_as(spec_of("prompt_tuning", {"n_virtual_tokens": n}))
        found = {int((words == vector).all(1).nonzero()[0]) for vector in vectors}
        assert len(vectors) == n and len(found) == n_different and not found & set(tokenizer.all_special_ids)
    vectors, _ = begins_as(spec_of("prompt_tuning", {"n_virtual_tokens": 50, "initialisation": "random"}))
    assert vectors.abs().max() <= 0.5 and abs(vectors.mean()) < 0.05 and vectors.std() == pytest.approx(12**-0.5, rel=0.1)


def test_a_prefix_begins_as_the_cache_of_words_and_so_scores_as_they_do(spec_of):
    """The same words in the text, whose cache it is, must give the same answer."""
    spec = spec_of("prefix_tuning", {"n_virtual_tokens": 3})
    setting = prepare_trial(spec)
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model, torch.no_grad():
        n_words, special = model.network.config.vocab_size, setting.method.special_ids
        ids = sample_tokens(n_words, special, 3, torch.Generator().manual_seed(0))
        setting.method.prepare(model, 2, torch.Generator().manual_seed(0))
        queries = encode_prompts(spec, setting).sets["toy"]
        batch = make_batch(queries, range(6), setting.words, model)
        found = AdaptedModel(setting.method, model)(setting.method.scores, batch).labels
        words = make_batch(queries, range(6), setting.words, model, prefix_ids=tuple(ids.tolist()))
        torch.testing.assert_close(found, build_method("zero_shot", {}).scores(model, words).labels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", "  "])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(UserError, match="initialisation 'text' needs words"):
        build_method("prompt_tuning", {"initialisation": "text", "text": text})


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_take_room(spec_of, name):
    few, many = (run_trial(spec_of(name, {"n_virtual_tokens": n}, epochs=1, n_test=4), CPU).record for n in (1, 30))
    assert many.cost.tokens_per_query == few.cost.tokens_per_query + 29
    assert many.cost.tokens_trained == few.cost.tokens_trained + 29 * 16
    assert many.cost.tokens_evaluated == few.cost.tokens_evaluated + 29 * (
        8 + 2 * 4
    )  # dev, and four rows of two sets, once: the last is the best
    spec = spec_of(name)
    longest = max(encode_prompts(spec, prepare_trial(spec)).lengths("shots"))  # with 20 virtual tokens
    record = run_trial(spec_of(name, {"n_virtual_tokens": 30}, max_length=longest), CPU).record
    assert record.cause == "query_too_long" and "30 virtual tokens" in record.message


def test_the_nearest_words_are_in_the_record(spec_of):
    settings = {"n_virtual_tokens": 6, "initialisation": "text", "text": "Yes No"}
    spec = spec_of("prompt_tuning", settings, learning_rate=1e-9, epochs=1)
    tokenizer = load_tokenizer(spec.model)
    names = tokenizer.convert_ids_to_tokens(tokenizer("Yes No", add_special_tokens=False)["input_ids"])
    found = run_trial(spec, CPU).record.virtual_tokens
    assert len(found) == 6
    for token, name in zip(found, (names * 6)[:6], strict=True):
        assert list(token.cosine)[0] == list(token.distance)[0] == name and len(token.cosine) == 3
        assert token.cosine[name] == pytest.approx(1, abs=1e-5) and token.distance[name] == pytest.approx(0, abs=1e-4)
        assert sorted(token.cosine.values(), reverse=True) == list(token.cosine.values())
    assert run_trial(spec_of("prefix_tuning"), CPU).record.virtual_tokens == []


def test_what_is_kept_is_what_the_encoder_computes(spec_of):
    for name, settings, shape in (
        ("p_tuning", {"n_virtual_tokens": 3}, (3, 32)),
        ("prefix_tuning", {"n_virtual_tokens": 3, "reparametrise": True}, (3, 2 * 2 * 32)),
    ):
        result = run_trial(spec_of(name, settings), replace(CPU, keep_weights=True))
        assert {key: tuple(tensor.shape) for key, tensor in load(result.weights).items()} == {"soft_prompt.vectors": shape}
        assert result.record.cost.stored_bytes == 4 * shape[0] * shape[1] < 4 * result.record.cost.n_trainable_parameters


def test_a_real_folder_of_a_narrow_embedding(tmp_path, tokenizer, spec_of):
    """OPT-350m embeds into fewer numbers than it computes with."""
    net = network(config("opt", len(tokenizer)).__class__(**{
        **config("opt", len(tokenizer)).to_dict(), "word_embed_proj_dim": 16, "do_layer_norm_before": False,
    }))  # fmt: skip
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = run_trial(spec_of("prompt_tuning", {"n_virtual_tokens": 3}, model=resolve_model(str(tmp_path))), CPU).record
    assert record.finished, record.message
    assert record.cost.n_trainable_parameters == 3 * 16
