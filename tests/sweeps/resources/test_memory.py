"""Estimates from counted weights and a formula, against the same trials run in truth."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.memory import estimate_of, one_thread, peak_of_trial, tiny_flan  # noqa: F401
from transformers import GPT2Config, OPTConfig

from llmft.config.spec import ModelRef
from llmft.methods._registry import METHODS, method_class
from llmft.models.batch_planning import DEFAULT_PASS_OVERHEAD_TOKENS, PASS_OVERHEAD_TOKENS
from llmft.models.loading import borrow_model
from llmft.runtime import Runtime
from llmft.training.optimizers import build_optimizer
from llmft.trial.preparation import prepare_trial
from llmft.trial.run import run_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.resources.memory import estimate_memory
from sweeps.resources.network_sizes import count_networks
from sweeps.resources.workload import SAMPLE, largest_workload

DISTILLED = {"over": "vocabulary", "n_unlabelled": 300, "student": "lora"}  # the targets weigh more than the training
RECURSIVE = {"rounds": 2, "n_unlabelled": 64, "student": "prompt_tuning"}
CLASSIFIERS = [name for name in METHODS if "classification" in method_class(name).kinds]


def cells_of(model, method, resolve_model=None, train=None, **changes):
    shots = {"n_shots": [16]} if method_class(method).uses_shots else {}
    shots |= {"mixture": ["toy_text"], "settings": {"n_examples": 16}} if method == "multi_task" else {}
    shots |= {"settings": {"max_rationale_tokens": 8}} if method == "rationale_tuning" else {}
    content = {
        "models": [model], "tasks": ["toy"], "methods": {method: shots}, "report": {"seeds": [0, 1]}, "n_dev": 8, "n_test": 64,
        "train": {"epochs": 3, "batch_size": 16} | (train or {}),
    }  # fmt: skip
    return build_cells(parse_plan(content | changes, "test"), resolve_model=resolve_model)


def own_bytes(tensors):
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


@pytest.mark.parametrize(
    ("method", "train"),
    [(name, {}) for name in CLASSIFIERS if method_class(name).base_weights == "fp32"]
    + [("pattern", {"optimizer": "adafactor"}), ("lora", {"optimizer": "sgd"})],
)
def test_parameters_gradients_and_states_are_those_of_a_real_model(tiny_model, method, train):
    (cell,) = cells_of(tiny_model, method, train=train)
    estimated, prepared = estimate_of([cell], on_gpu=True), prepare_trial(cell.base)
    with borrow_model(cell.base.model, "fp32", torch.device("cpu")) as model:
        assert estimated.n_parameters == sum(p.numel() for p in model.network.parameters())
        assert estimated.base_bytes == own_bytes([*model.network.parameters(), *model.network.buffers()])
        if prepared.method.trains:
            prepared.method.prepare(model, len(prepared.task.labels), torch.Generator().manual_seed(0))
        assert estimated.weight_bytes == own_bytes([*model.network.parameters(), *model.network.buffers()])
        trained = [p for p in model.network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    assert (estimated.n_trainable, estimated.gradient_bytes) == (sum(p.numel() for p in trained), own_bytes(p.grad for p in trained))
    states = []
    if trained:
        optimizer = build_optimizer(cell.base.train, trained, {})
        optimizer.step()
        states = [s for state in optimizer.state.values() for name, s in state.items() if torch.is_tensor(s) and name != "step"]
    assert estimated.optimizer_bytes == own_bytes(states)
    assert estimated.checkpoint_bytes == (estimated.gradient_bytes if "best_dev" in cell.base.selections else 0)
    assert bool(trained) == (method_class(method).trains)


def test_weights_in_4_bits_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    (cell,) = cells_of("toy", "qlora", selections=["last"])  # the tiny model is too narrow
    estimated = estimate_of([cell], on_gpu=False)
    with borrow_model(cell.base.model, "fp32", torch.device("cpu"), base_weights="nf4") as model:
        stored = own_bytes([*model.network.parameters(), *model.network.buffers()])
        layers = [module.weight for module in model.network.modules() if type(module).__name__ == "Linear4bit"]
    stored += sum(weight.quant_state.absmax.nbytes for weight in layers)
    assert estimated.base_bytes == pytest.approx(stored, rel=0.01)
    full = estimate_of(cells_of("toy", "lora"), on_gpu=False)
    assert estimated.base_bytes < 0.4 * full.base_bytes and estimated.n_parameters == full.n_parameters


@pytest.mark.parametrize(
    ("method", "changes"),
    [(name, {}) for name in CLASSIFIERS if method_class(name).base_weights == "fp32"]
    + [("pattern", {"train": {"gradient_checkpointing": True}}), ("pattern", {"selections": ["last"]})]
    + [(name, {"precision": "bf16"}) for name in ("zero_shot", "in_context", "pattern", "lora")]
    + [("lora", {"train": {"batch_size": 4}})]
    + [("pattern", {"methods": {"pattern": {"settings": {"untie_embeddings": True}}}})]
    + [("context_distillation", {"methods": {"context_distillation": {"settings": DISTILLED}}})]
    + [("context_distillation", {"methods": {"context_distillation": {"settings": RECURSIVE, "n_shots": [4]}}})],
)
def test_an_estimate_is_within_30_percent_of_a_real_trial(tiny_model, method, changes):
    (cell,) = cells_of(tiny_model, method, **changes)
    estimated = estimate_of([cell], on_gpu=False)
    peak = max(peak_of_trial(cell.report_spec({}, seed))[0] for seed in cell.report_seeds)
    beside_base = estimated.cpu_bytes - estimated.base_bytes
    assert peak / 1.3 <= beside_base <= 1.3 * peak + estimated.checkpoint_bytes  # not there where the last epoch is the best


@pytest.mark.parametrize(
    ("method", "changes"), [("in_context", {}), ("lora", {}), ("pattern", {"train": {"gradient_checkpointing": True}})]
)
def test_an_encoder_and_its_decoder_take_what_is_estimated(tiny_flan, method, changes):  # noqa: F811
    test_an_estimate_is_within_30_percent_of_a_real_trial(tiny_flan, method, changes)


def from_config(config, tokenizer, folder):
    """What resolves to a model of this shape, of which there is nothing but the configuration and a tokenizer."""
    config.save_pretrained(folder)
    for file in Path(tokenizer).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return lambda name, revision: ModelRef(name=name, revision=revision, fingerprint="shape", path=str(folder))


@pytest.fixture
def large(tiny_model, tmp_path):
    """The shape of OPT-6.7b with fewer blocks."""
    config = OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=4 * 4096, num_hidden_layers=4, num_attention_heads=32)
    return from_config(config, tiny_model, tmp_path)


def test_sizes_of_a_large_model_follow_from_its_configuration(large):
    """By hand: 12 d^2 + 13 d weights in a block, embeddings of words and positions, a last layer norm."""
    width, depth, n_words, n_positions = 4096, 4, 50272, 2050
    (cell,), (tuned,) = cells_of("big", "lora", large), cells_of("big", "pattern", large)
    alone = estimate_of([cell], on_gpu=True)
    block, outside = 12 * width**2 + 13 * width, (n_words + n_positions) * width + 2 * width
    lora = depth * 2 * 8 * 2 * width  # on query and value, of rank 8
    assert (alone.n_parameters, alone.n_trainable) == (depth * block + outside, lora)
    assert alone.weight_bytes == 4 * (depth * block + outside + lora) and alone.base_bytes == 4 * (depth * block + outside)
    assert (alone.gradient_bytes, alone.optimizer_bytes, alone.checkpoint_bytes) == (4 * lora, 8 * lora, 4 * lora)
    sharded = estimate_of([cell], on_gpu=True, n_workers=4, strategy="fsdp")
    assert sharded.weight_bytes * 4 == alone.weight_bytes and sharded.optimizer_bytes * 4 == alone.optimizer_bytes
    adapters = lora // depth
    assert sharded.gathered_bytes == 4 * (outside + 2 * (block + adapters) + adapters)
    assert sharded.training_bytes < alone.training_bytes  # a quarter of the batch in each
    (in_half,) = cells_of("big", "lora", large, precision="bf16")
    half = estimate_of([in_half], on_gpu=True, n_workers=4, strategy="fsdp")
    assert half.gathered_bytes == 4 * outside + 2 * 2 * (block + adapters) + 4 * adapters
    assert half.weight_bytes == sharded.weight_bytes
    replicated, sharded = (estimate_of([tuned], on_gpu=True, n_workers=4, strategy=how) for how in ("ddp", "fsdp"))
    assert sharded.weight_bytes * 4 == replicated.weight_bytes == 4 * (depth * block + outside)
    assert 16 * replicated.n_parameters < replicated.device_bytes and sharded.device_bytes < replicated.device_bytes


def test_methods_are_in_the_order_of_what_they_train(large):
    order = ["zero_shot", "head_only", "bitfit", "lora", "adapter_houlsby", "last_layers", "pattern"]
    device = [estimate_of(cells_of("big", name, large), on_gpu=True).device_bytes for name in order]
    assert device == sorted(device) and device[-1] > 3 * device[0]
    quantized = estimate_of(cells_of("big", "qlora", large), on_gpu=True)
    assert quantized.weight_bytes < 0.6 * estimate_of(cells_of("big", "lora", large), on_gpu=True).weight_bytes


def test_a_prefix_is_kept_as_keys_and_values(large):
    (cell,) = cells_of("big", "in_context", large)
    work = largest_workload([cell])
    assert work.tests.shared and work.tests.prefix > 100
    networks = count_networks(work)
    whole = estimate_memory(work, networks, on_gpu=True)
    without = dataclasses.replace(work, dev=dataclasses.replace(work.dev, prefix=0), tests=dataclasses.replace(work.tests, prefix=0))
    keys_and_values = 2 * 4 * work.tests.prefix * 4096 * 4  # of four layers
    assert whole.scoring_bytes - estimate_memory(without, networks, on_gpu=True).scoring_bytes >= keys_and_values
    (half,) = cells_of("big", "in_context", large, precision="bf16")
    half = estimate_of([half], on_gpu=True)
    assert half.weight_bytes * 2 == whole.weight_bytes and half.scoring_bytes < whole.scoring_bytes


def test_what_takes_less(tiny_model):
    def of(on_gpu=True, strategy="none", tokens=None, **changes):
        return estimate_of(
            cells_of(tiny_model, "pattern", **changes), on_gpu=on_gpu, n_workers=1 if strategy == "none" else 2, strategy=strategy,
            micro_batch_tokens=tokens,
        )  # fmt: skip

    whole, half = of(), of(precision="bf16")
    assert of(train={"gradient_checkpointing": True}).training_bytes < whole.training_bytes
    assert of(train={"batch_size": 4}).training_bytes < of(train={"batch_size": 8}).training_bytes < whole.training_bytes
    assert of(tokens=128).training_bytes < whole.training_bytes and of(tokens=128).scoring_bytes < whole.scoring_bytes
    assert of(selections=["last"]).checkpoint_bytes == 0 < whole.checkpoint_bytes == whole.gradient_bytes
    assert half.weight_bytes == whole.weight_bytes  # trained in fp32, and cast for the computation


def test_attention_dropout_costs_its_matrix_on_a_cpu_alone(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(PASS_OVERHEAD_TOKENS, "cpu", DEFAULT_PASS_OVERHEAD_TOKENS)  # the same passes
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 500}
    cells = cells_of("shape", "pattern", from_config(GPT2Config(**shape), tiny_model, tmp_path))
    assert estimate_of(cells, on_gpu=True).training_bytes < estimate_of(cells, on_gpu=False).training_bytes


def test_every_round_is_counted(tiny_model):
    work, cost = {}, {}
    for rounds in (1, 3):
        methods = {"context_distillation": {"settings": RECURSIVE | {"rounds": rounds}, "n_shots": [4]}}
        (cell,) = cells_of(tiny_model, "context_distillation", methods=methods, report={"seeds": [0]})
        work[rounds], cost[rounds] = largest_workload([cell]), run_trial(cell.report_spec({}, 0), Runtime(device="cpu")).record.cost
    for rounds, counted in work.items():
        assert counted.tokens_trained == cost[rounds].tokens_trained
        assert counted.tokens_taught == pytest.approx(cost[rounds].tokens_teacher, rel=0.4)  # every round is taken to read dev
    assert work[3].tokens_evaluated(with_tests=False) == 3 * work[1].tokens_evaluated(with_tests=False)


def test_a_switch_that_is_searched_counts_as_on(tiny_model):
    entry = {"n_shots": [16], "search": {"untie_embeddings": {"choices": [False, True]}}}
    searched = cells_of(tiny_model, "pattern", methods={"pattern": entry}, search={"n_trials": 2, "seeds": [100]})
    fixed = cells_of(tiny_model, "pattern", methods={"pattern": {"n_shots": [16], "settings": {"untie_embeddings": True}}})
    searched, fixed, plain = (estimate_of(cells, on_gpu=False) for cells in (searched, fixed, cells_of(tiny_model, "pattern")))
    assert searched == fixed and fixed.n_trainable > plain.n_trainable == plain.n_parameters == fixed.n_parameters
    assert fixed.start_bytes == 4 * fixed.n_trainable


def test_a_sample_of_a_test_set_is_tokenized_with_its_longest_prompt(tiny_model, monkeypatch):
    (cell,) = cells_of(tiny_model, "zero_shot", n_test=512)
    n_read = []
    monkeypatch.setattr("sweeps.resources.workload.encode_prompts", lambda spec, prepared: n_read.append(prepared) or real(spec, prepared))
    from llmft.trial.preparation import encode_prompts as real

    work, prepared = largest_workload([cell]), prepare_trial(cell.base)
    assert all(len(test.examples) <= SAMPLE for trial in n_read for test in trial.tests) and n_read
    lengths = {name: queries.lengths for name, queries in real(cell.base, prepared).sets.items() if name != "dev"}
    for prompts, whole in zip(work.tests.sets, lengths.values(), strict=True):
        assert prompts.n == len(whole) > SAMPLE and max(prompts.sample) >= 0.75 * max(whole)  # it is the longest in characters
        assert prompts.n_tokens == pytest.approx(sum(whole), rel=0.05)
