"""Untied embeddings, against the tied model and transformers' own files."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load
from support.small_models import CPU, ENCODER_DECODERS, OPT_350M, config, network, save_model
from support.training import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods.modules.untied_embeddings import untie_embeddings
from llmft.models.info import resolve_model
from llmft.models.loading import LoadedModel, _load_base, borrow_model, checksum
from llmft.trial.export import export_model
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial
from llmft.trial.weights import restored

UNTIED, N_WORDS = {"untie_embeddings": True}, 50
IDS = torch.tensor([[2, 30, 9, 20, 7], [2, 8, 17, 6, 5]])
SHAPES = {"opt-350m": ("opt", OPT_350M), **ENCODER_DECODERS}
TIED = {"opt": 32, "opt-350m": 16, "gpt2": 32, "bloom": 32, "gemma2": 32, "t5": 32, "bart": 32}
"""family: the width of its embeddings"""


def borrowed(family: str) -> LoadedModel:
    architecture, changed = SHAPES.get(family, (family, {}))
    net = network(config(architecture, N_WORDS, **changed))
    return LoadedModel(copy.deepcopy(net), torch.device("cpu"), "fp32", plain_head=True)


def logits(net: torch.nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    return net(input_ids=IDS, use_cache=False, **more).logits


def n_parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("family", TIED)
def test_the_head_becomes_a_matrix_of_its_own_that_says_the_same(family):
    model = borrowed(family)
    net, before, n_before = model.network, logits(model.network), n_parameters(model.network)
    untie_embeddings(model)
    assert torch.equal(logits(net), before)
    assert n_parameters(net) == n_before + N_WORDS * TIED[family]
    assert net.get_output_embeddings().weight.data_ptr() != net.get_input_embeddings().weight.data_ptr()
    assert model.base_names == {name for name, _ in net.named_parameters()}
    net.tie_weights()  # as transformers does where it is asked to load or to resize
    assert n_parameters(net) == n_before + N_WORDS * TIED[family]


@pytest.mark.parametrize("family", TIED)
def test_the_tied_gradient_is_the_sum_of_both(family):
    gradients = []
    for is_untied in (False, True):
        model = borrowed(family)
        if is_untied:
            untie_embeddings(model)
        net = model.network.requires_grad_(True)
        logits(net).log_softmax(-1)[..., 3].mean().backward()
        gradients.append([embedding.weight.grad for embedding in (net.get_input_embeddings(), net.get_output_embeddings())])
    (tied, _), (words, head) = gradients
    assert words.abs().max() > 0 and head.abs().max() > 0
    torch.testing.assert_close(tied, words + head, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "flan"])
def test_a_model_with_a_head_of_its_own_is_told(family):
    with pytest.raises(UserError, match="untie_embeddings: there is nothing to untie, this '.*' model has an output embedding of its own"):
        untie_embeddings(borrowed(family))


def test_a_mistake_ends_in_one_line(spec_of, refs):
    record = run_trial(spec_of("pattern", UNTIED, model=refs["flan"]), CPU).record
    assert (record.status, record.cause) == ("failed", "user_error")
    assert record.message.startswith("untie_embeddings: there is nothing to untie") and "\n" not in record.message


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, small_opt, refs):
    folder = tmp_path_factory.mktemp("untied")
    shapes = {"opt-350m": ("opt", OPT_350M), "gpt2": ("gpt2", {})}
    saved = {name: resolve_model(save_model(folder / name, shape, tokenizer, **changed)) for name, (shape, changed) in shapes.items()}
    return saved | {"opt": small_opt, "t5": refs["t5"], "bart": refs["bart"]}


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "t5", "bart"])
def test_what_was_trained_apart_is_kept_restored_and_exported(tmp_path, spec_of, models, family):
    spec = spec_of("pattern", UNTIED, model=models[family], selections=("last",), learning_rate=1e-2)
    base, _ = _load_base(spec.model, None)
    before, tied = checksum(base), run_trial(spec_of("pattern", model=models[family], epochs=1), CPU).record.cost
    result = run_trial(spec, dataclasses.replace(CPU, keep_weights=True))
    assert result.record.finished, result.record.message
    n_more = base.get_output_embeddings().weight.numel()
    assert result.record.cost.n_trainable_parameters == tied.n_trainable_parameters + n_more
    assert result.record.cost.stored_bytes == tied.stored_bytes + 4 * n_more
    # the base is as it was for the next trial
    assert _load_base(spec.model, None)[0] is base and checksum(base) == before and base.config.tie_word_embeddings
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        assert model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    # both matrices have moved, each its own way, and are kept
    (tmp_path / "weights").write_bytes(result.weights)
    kept, setting = load(result.weights), prepare_trial(spec)
    assert sum(tensor.numel() for tensor in kept.values()) == result.record.cost.n_trainable_parameters
    with restored(spec, tmp_path / "weights", torch.device("cpu")) as adapted, torch.no_grad():
        net, start = adapted.network, base.get_input_embeddings().weight
        words, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
        assert all((a - b).abs().max() > 1e-3 for a, b in ((words, start), (head, start), (words, head)))
        predicted = Evaluator(adapted, encode_prompts(spec, setting), setting.words, CPU).predict("toy")
        assert predicted.score == result.record.metrics["last"]["toy"].accuracy
        assert predicted.loss == pytest.approx(result.record.metrics["last"]["toy"].loss, rel=1e-6)
        expected = logits(net)
    export_model(spec, result.weights, tmp_path / "model")
    loader = AutoModelForSeq2SeqLM if net.config.is_encoder_decoder else AutoModelForCausalLM
    theirs = loader.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    assert theirs.get_output_embeddings().weight is not theirs.get_input_embeddings().weight
    if family != "t5":  # whose configuration says it of no model
        assert AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings is False


def test_both_matrices_count_for_the_distance_and_are_pulled(spec_of):
    """By hand, for L2-SP so strong that nothing moves far; and free."""
    distances = []
    for strength in (0.0, 50.0):
        spec = spec_of("regularised", {**UNTIED, "strength": strength}, learning_rate=1e-3, epochs=4, optimizer="sgd", clip_norm=None)
        result, weights = train(spec)
        start = dict(AutoModelForCausalLM.from_pretrained(spec.model.path).named_parameters())
        start["lm_head.weight"] = start["model.decoder.embed_tokens.weight"]
        squares = {name: float((weights[name] - start[name].detach()).square().sum()) for name in weights}
        assert result.weight_distance["last"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)
        distances.append(squares["lm_head.weight"])
    assert 0 < distances[1] < 0.9 * distances[0]


def test_every_method_that_trains_the_whole_model_has_it(spec_of):
    for name, settings in {
        "regularised": UNTIED, "finetuned_in_context": UNTIED,
        "context_distillation": {"student": "pattern", "student_settings": UNTIED, "n_unlabelled": 8},
    }.items():  # fmt: skip
        record = run_trial(spec_of(name, settings, n_test=4), CPU).record
        assert record.finished, record.message
        assert record.cost.n_trainable_parameters > record.cost.n_parameters
    with pytest.raises(UserError, match="method 'lora': unknown key 'untie_embeddings'"):
        spec_of("lora", UNTIED)
