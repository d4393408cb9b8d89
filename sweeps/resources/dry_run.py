"""What a trial does, done on tensors without data: its network, from the configuration alone, trains and scores in PyTorch's
fake-tensor mode, which knows shapes and types alone. A meter says what is alive at the worst moment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmft.config import ModelRef, TrialSpec
from llmft.evaluation import Evaluator
from llmft.models import (
    DROPOUT,
    AdaptedModel,
    LoadedModel,
    Prefix,
    QueryBatch,
    encode_prefix,
    encoder_outputs,
    language_model,
    largest_training_step,
    last_states,
    load_config,
    make_batch,
    own_logits,
    read_shared,
    scoring_budget,
    text_inputs,
)
from llmft.prompting import SHOTS, EncodedQueries, EncodedTrial
from llmft.runtime import Runtime
from llmft.training import sum_of_squares
from sweeps.resources.tensor_meter import Meter, Operations
from sweeps.resources.workload import Reading, Workload

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")


def build(spec: TrialSpec, on_gpu: bool, ref: ModelRef | None = None) -> torch.nn.Module:
    """The network of `ref` (None: of the trial's model) in fp32 on the meta device, as `llmft.models.loading` loads it."""
    config, changed = copy.deepcopy(load_config(ref or spec.model)), {}
    if spec.train.dropout is not None:
        changed = dict.fromkeys(DROPOUT.get(config.model_type, ()), spec.train.dropout)
    if on_gpu:  # its fused attention has dropout within; a CPU's falls back on the matrix of scores
        changed |= {name: 0.0 for name in ATTENTION_DROPOUT if hasattr(config, name)}
    for name, value in changed.items():
        setattr(config, name, value)
    with torch.device("meta"):
        network = language_model(config).from_config(config, dtype=torch.float32)
        if not getattr(config, "scale_decoder_outputs", True):  # T5 1.1: transformers ties it until it sees the weights
            network.set_output_embeddings(copy.deepcopy(network.get_output_embeddings()))
    return network.requires_grad_(False).eval()


def fake(network: torch.nn.Module) -> None:
    """Move a network from the meta device to a CPU without data. (Inside the mode `Module.to` fails on tensors of its own.)"""
    moved: dict[int, torch.Tensor] = {}  # what modules share stays shared
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in moved:
                    here = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = torch.nn.Parameter(here, tensor.requires_grad) if is_parameter else here
                tensors[name] = None if tensor is None else moved[id(tensor)]


@torch.no_grad()
def has_plain_head(network: torch.nn.Module) -> bool:
    """What `llmft.models.loading` finds by comparing logits, told by whether the network's own forward computes anything more."""
    ids, head = torch.zeros(1, 3, dtype=torch.long), network.get_output_embeddings()
    with Operations() as own:
        own_logits(network, ids)
    with Operations() as plain:
        head(last_states(network, ids))
    return +own.counts == +plain.counts


def batch_of(
    work: Workload,
    model: LoadedModel,
    lengths: Sequence[int],
    prefix: Prefix | None = None,
    completions: Sequence[int] = (),
) -> QueryBatch:
    """A batch of prompts of these lengths, which end in completions; which tokens they have does not matter."""
    ends = [n - 1 for n in completions] or [0] * len(lengths)
    queries = EncodedQueries(
        tuple((0,) * (length - n) for length, n in zip(lengths, ends, strict=True)),
        (0,) * len(lengths),
        work.start,
        completions=tuple((0,) * n for n in completions),
    )
    return make_batch(queries, range(len(lengths)), work.words, model, prefix)


def _generate(model: LoadedModel, batch: QueryBatch, n_new: int) -> None:
    """What `llmft.models.generation` needs the most: a pass over the prompts, and the last step, when all keys and values are there."""
    from transformers import DynamicCache, EncoderDecoderCache

    if batch.decoder_input_ids is not None:
        kept = batch.input_ids.new_zeros(2, len(batch), n_new)  # ids, and once more while they grow
        encoded, cache = encoder_outputs(model, batch), EncoderDecoderCache(DynamicCache(), DynamicCache())
        for n_before in (0, n_new - 1):
            _grow(cache.self_attention_cache, n_before)
            states = model.network(
                encoder_outputs=encoded, attention_mask=batch.attention_mask, decoder_input_ids=batch.decoder_input_ids,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            states.logits[:, -1].to(torch.float32, copy=True)
        del kept
        return
    cache = batch.prefix.cache(len(batch)) if batch.prefix else DynamicCache()
    head = model.network.get_output_embeddings()

    def step(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        states = model.network.base_model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = head(states.last_hidden_state[:, -1])
        logits.to(torch.float32, copy=True)

    length = batch.attention_mask.shape[1] + n_new
    kept = batch.input_ids.new_zeros(6, len(batch), length)  # ids, mask, positions, and each once more while it grows
    step(text_inputs(model, batch), batch.attention_mask)
    _grow(cache, n_new - 1)
    step({"input_ids": batch.input_ids[:, :1]}, torch.cat([batch.attention_mask, batch.attention_mask.new_ones(len(batch), n_new)], 1))
    del kept


def _grow(cache: Any, n: int) -> None:
    """Put `n` further places into a cache that has been used."""
    for layer in cache.layers:
        grown = list(layer.keys.shape)
        grown[2] = n
        layer.keys, layer.values = (torch.cat([old, old.new_zeros(grown)], 2) for old in (layer.keys, layer.values))


def weigh(work: Workload, adapted: AdaptedModel, meter: Meter) -> int:
    """The Fisher information from the longest query, as in `llmft.training.weight_anchor`; gives what is alive at the worst moment beyond weights,
    gradients and the sums of their squares."""
    if not work.n_fisher_samples:
        return 0
    longest = EncodedQueries(((0,) * (max(work.shots) - work.n_virtual_tokens),), (0,), work.start)
    evaluator = Evaluator(adapted, EncodedTrial((), {SHOTS: longest}, (), 0), work.words, Runtime())
    trained = [parameter for parameter in adapted.network.parameters() if parameter.requires_grad]
    before = meter.peak = meter.now
    sum_of_squares(evaluator, trained, 1, 0)
    return meter.peak - before - 2 * sum(parameter.nbytes for parameter in trained)


def train(work: Workload, adapted: AdaptedModel, meter: Meter, budget: int, n_workers: int, device: torch.device) -> int:
    """Forward and backward on the largest passes that a process may get, as in `llmft.training.loop`; gives what is alive at the worst
    moment beyond weights and gradients. The optimiser's step is not run."""
    method, model = adapted.method, adapted.model
    if not method.trains:
        return 0
    if work.spec.train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.network.train()
    longest, completions = work.shots[::-1], work.completions[::-1]
    before = meter.peak = meter.now
    for group in _largest_passes(longest, work.spec.train.batch_size, budget, n_workers, device):
        ends = [completions[i] for i in group if completions]
        batch = batch_of(work, model, [longest[i] - work.n_virtual_tokens for i in group], completions=ends)
        loss = adapted(adapted.method.loss, batch)
        loss.backward()
        del loss, batch
    gradients = [parameter.grad for parameter in model.network.parameters() if parameter.grad is not None]
    peak = meter.peak - before - sum(gradient.nbytes for gradient in gradients)
    for parameter in model.network.parameters():
        parameter.grad = None
    return peak


def _largest_passes(lengths: Sequence[int], batch_size: int, budget: int, n_workers: int, device: torch.device) -> list[list[int]]:
    """The first pass of a step, and the largest after it, when the gradients are there already: of the step that has the largest.

    Args:
        lengths: tokens of all that is trained on, the longest first.

    Returns:
        Places in `lengths`.
    """
    passes = largest_training_step(lengths, batch_size, budget, device, n_workers)
    if n_workers > 1:
        return passes[:2]
    return [passes[0], max(passes[1:], key=lambda group: lengths[group[0]] * len(group))] if len(passes) > 1 else passes


@torch.no_grad()
def score(
    work: Workload, adapted: AdaptedModel, compute: Callable, readings: Sequence[Reading], meter: Meter, budget: int
) -> tuple[int, int]:
    """Score as in `llmft.evaluation.evaluator`, by `compute`; gives the bytes of the longest shared prefix, and all that is alive at
    the worst moment beyond weights."""
    adapted.network.eval()
    before, prefix_bytes = meter.now, 0
    meter.peak = before
    for reading in readings:
        prefix = _encode_prefix(adapted.model, reading.prefix) if reading.shared else None
        if prefix and reading.n_new_tokens:  # rows that go on generating get copies
            prefix = replace(prefix, is_shared=False)
        prefix_bytes = max(prefix_bytes, sum(t.nbytes for layer in (prefix.layers if prefix else ()) for t in layer))
        pass_budget, overhead = scoring_budget(budget, prefix)
        besides = reading.n_virtual_tokens + reading.n_new_tokens + overhead
        for n, length in reading.largest_batches(budget, overhead) if reading.n_new_tokens else ():
            batch = batch_of(replace(work, words=None), adapted.model, [length - besides] * n, prefix)
            with adapted.model.autocast():
                _generate(adapted.model, adapted.method.prepend_prompt(adapted.model, batch), reading.n_new_tokens)
        for n, length in reading.largest_batches(pass_budget, overhead) if work.words else ():
            adapted(compute, batch_of(work, adapted.model, [length - besides + reading.n_new_tokens] * n, prefix))
    return prefix_bytes, meter.peak - before


def _encode_prefix(model: LoadedModel, length: int) -> Prefix:
    """As `llmft.models.prefix_attention.encode_shared`, which compares numbers besides."""
    with model.autocast():
        prefix = encode_prefix(model, (0,) * length)
        again = read_shared(model.network, torch.zeros(2, 4, dtype=torch.long), prefix)
    return replace(prefix, is_shared=again is not None)
