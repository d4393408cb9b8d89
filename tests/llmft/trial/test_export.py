from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel
from support.small_models import CPU, save_model, t5_tokenizer, toy_text
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from llmft.config.custom_task import CustomTask
from llmft.data.custom import TableTask, complete
from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import make_batch
from llmft.models.info import resolve_model
from llmft.models.loading import borrow_model
from llmft.models.scoring import all_logits
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.label_words import LabelWords
from llmft.trial.export import export_adapter, export_model
from llmft.trial.run import run_trial
from llmft.trial.weights import put_weights, restored

KEEPING = dataclasses.replace(CPU, keep_weights=True)
IDS, WORDS = torch.tensor([[2, 30, 90, 200, 7], [2, 8, 17, 6, 5]]), LabelWords(("a", "b"), ((7,), (8,)))


def trained(spec) -> bytes:
    result = run_trial(spec, KEEPING)
    assert result.record.finished, result.record.message
    return result.weights


@torch.no_grad()
def own_logits(spec, weights: bytes) -> torch.Tensor:
    """Of the trial's own model for the words of `IDS`, without any file in between. (Learned prompts are held against transformers
    in test_soft_prompts.)"""
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        method, queries = build_method(spec.method, spec.settings), EncodedQueries(tuple(map(tuple, IDS.tolist())), (0, 0))
        method.prepare(model, 2, torch.Generator().manual_seed(5))
        adapted = AdaptedModel(method, model).eval()
        method.finalize(adapted)
        put_weights(model, weights, "test")
        return adapted(all_logits, make_batch(queries, [0, 1], WORDS, model))


@torch.no_grad()
def logits(net) -> torch.Tensor:
    """The same of a model of transformers or peft, where a prompt that it opens with has logits too."""
    return net.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


def base_of(spec):
    return AutoModelForCausalLM.from_pretrained(spec.model.path).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, small_opt):
    folder = tmp_path_factory.mktemp("export")
    saved = {name: resolve_model(save_model(folder / name, name, tokenizer)) for name in ("gpt2", "llama")}
    return saved | {"opt": small_opt}


ADAPTERS = {
    "lora": ("lora", {"r": 2}),
    "dora": ("lora", {"targets": "all-linear", "dora": True, "rslora": True}),
    "ia3": ("ia3", {}),
    "prompt_tuning": ("prompt_tuning", {"n_virtual_tokens": 3}),
    "p_tuning": ("p_tuning", {"n_virtual_tokens": 3}),
    "prefix_tuning": ("prefix_tuning", {"n_virtual_tokens": 3}),
    "encoded prefix": ("prefix_tuning", {"n_virtual_tokens": 3, "reparametrise": True, "encoder_width": 8}),
    "distilled prompt": ("context_distillation", {"student": "prompt_tuning", "n_unlabelled": 16}),
    "distilled lora": ("context_distillation", {"student": "lora", "n_unlabelled": 16}),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@each_adapter
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_peft_loads_what_was_trained(tmp_path, spec_of, models, architecture, adapter):
    spec = spec_of(*ADAPTERS[adapter], learning_rate=0.05, model=models[architecture], n_shots=8)
    weights = trained(spec)
    expected = own_logits(spec, weights)
    export_adapter(spec, weights, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base_of(spec), tmp_path / "adapter")
    assert (expected - logits(base_of(spec))).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    config = theirs.peft_config["default"]
    assert (config.base_model_name_or_path, config.task_type, config.inference_mode) == (spec.model.path, "CAUSAL_LM", True)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "distilled lora"])
def test_a_merged_adapter_says_the_same(tmp_path, spec_of, models, architecture, adapter):
    spec = spec_of(*ADAPTERS[adapter], learning_rate=0.05, model=models[architecture], n_shots=8)
    weights = trained(spec)
    export_model(spec, weights, tmp_path / "merged")
    torch.testing.assert_close(logits(base_of(spec).from_pretrained(tmp_path / "merged")), own_logits(spec, weights), atol=2e-5, rtol=1e-5)
    ours, theirs = (AutoTokenizer.from_pretrained(path)("Yes").input_ids for path in (tmp_path / "merged", spec.model.path))
    assert ours == theirs


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return resolve_model(save_model(tmp_path_factory.mktemp("export") / "t5", "t5", t5_tokenizer(toy_text())))


@pytest.mark.parametrize("adapter", ["lora", "ia3", "prompt_tuning", "p_tuning", "distilled prompt"])
def test_peft_loads_what_was_trained_beside_an_encoder(tmp_path, spec_of, t5, adapter):
    spec = spec_of(*ADAPTERS[adapter], learning_rate=0.05, model=t5, n_shots=8)
    weights = trained(spec)
    export_adapter(spec, weights, tmp_path / "adapter")
    (tmp_path / "weights").write_bytes(weights)
    base = AutoModelForSeq2SeqLM.from_pretrained(t5.path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    queries = EncodedQueries(tuple(map(tuple, IDS.tolist())), (0, 0), decoder_prefix=(0,))
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    with restored(spec, tmp_path / "weights", torch.device("cpu")) as adapted, torch.no_grad():
        ours = adapted(adapted.method.scores, make_batch(queries, [0, 1], WORDS, adapted.model)).labels
        found, before = (net(**inputs).logits[:, 0].log_softmax(-1)[:, [7, 8]] for net in (theirs, base.eval()))
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 0.01


@pytest.fixture
def own_task(tmp_path) -> dict:
    """Fields of a spec: a task of the user's own."""
    for name, word in (("train", "doctor"), ("test", "nurse")):
        rows = [f"{word} {i},{('no', 'yes')[i % 2]}" for i in range(40)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    definition = CustomTask(
        name="mine", train=f"{tmp_path}/train.csv", test={"in_domain": f"{tmp_path}/test.csv"}, label="label",
        patterns={"minimal": "{text} ?"},
    )  # fmt: skip
    data = TableTask(definition).resolve_data()
    return {"task": "mine", "definition": complete(definition, data), "data": data}


@pytest.mark.parametrize("adapters", [("lora", "dora"), ("prompt_tuning", "p_tuning"), ("ia3", "ia3")])
def test_adapters_of_two_tasks_are_switched_on_one_base(tmp_path, spec_of, own_task, adapters):
    """One for the toy task, one for a task of the user's own, in one model of peft's; and none."""
    expected, specs = {}, {}
    for name, adapter, task in (("first", adapters[0], {}), ("second", adapters[1], own_task)):
        specs[name] = spec_of(*ADAPTERS[adapter], learning_rate=0.05, n_test=4, **task)
        weights = trained(specs[name])
        export_adapter(specs[name], weights, tmp_path / name)
        expected[name] = own_logits(specs[name], weights)
    base = logits(base_of(specs["first"]))
    model = PeftModel.from_pretrained(base_of(specs["first"]), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], atol=1e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=0)
    assert (expected["first"] - expected["second"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["pattern", "bitfit", "last_layers", "regularised", "finetuned_in_context", "context_distillation"])
def test_a_method_that_adds_nothing_becomes_a_whole_model(tmp_path, spec_of, name):
    spec = spec_of(name, learning_rate=0.01)
    weights = trained(spec)
    export_model(spec, weights, tmp_path / "model")
    written = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(written, own_logits(spec, weights), atol=1e-6, rtol=0)
    assert (written - logits(base_of(spec))).abs().max() > 0.001
    with pytest.raises(UserError, match=f"'{name}' has no form in peft. --merge"):
        export_adapter(spec, weights, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("vanilla", "restored"), ("head_only", "restored"), ("adapter_pfeiffer", "restored"), ("prompt_tuning", "Leave out --merge"),
     ("prefix_tuning", "Leave out --merge")],
)  # fmt: skip
def test_a_method_whose_parts_no_model_has_is_refused(tmp_path, spec_of, name, instead):
    spec = spec_of(name)
    with pytest.raises(UserError, match=f"'{name}' adds parts that no model of transformers has .*{instead}"):
        export_model(spec, trained(spec), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_exported_is_said(tmp_path, spec_of, tokenizer):
    spec = spec_of("lora", {"r": 2})
    weights = trained(spec)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_adapter(spec, weights, tmp_path / "full")
    with pytest.raises(UserError, match="kept weights and the prepared model differ"):
        export_adapter(spec_of("lora", {"targets": ["fc1"]}), weights, tmp_path / "new")
    model = save_model(tmp_path / "base", "opt", tokenizer)
    moved = spec.model_copy(update={"model": resolve_model(model).model_copy(update={"fingerprint": "0" * 16})})
    with pytest.raises(UserError, match="it has changed since"):
        export_adapter(moved, weights, tmp_path / "new")
