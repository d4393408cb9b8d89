"""The memory that a trial needs, from its own code run on tensors without data: any architecture and method, no weights needed.

The network is built from its configuration in PyTorch's fake-tensor mode, which knows shapes and types alone, and does what a
trial does: a training step on its longest batch, and scoring. A dispatch mode adds up the storages that are alive. What that
cannot see is inside of kernels and allocators; whoever asks whether a trial fits must leave room for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmft.adapted import Adapted
from llmft.architecture import DROPOUT, language_model, last_states, own_logits
from llmft.batches import Prefix, QueryBatch, encode_prefix, hardest_step, make_batch, scoring_budget, split_by_tokens
from llmft.blocks import find_blocks
from llmft.evaluate import Evaluator
from llmft.fisher import sum_of_squares
from llmft.method import Method
from llmft.model import BorrowedModel, load_config
from llmft.optimizers import state_bytes
from llmft.registry import load_task
from llmft.runtime import Runtime
from llmft.scoring import encoder_outputs, text_inputs
from llmft.setting import SHOTS, settle
from llmft.shared_prefix import read_shared
from llmft.spec import ModelRef, TrialSpec
from llmft.teacher import Untouched
from llmft.tokens import EncodedQueries, EncodedTrial
from sweeps.meter import Meter, Operations
from sweeps.packed import hold_in_4_bits
from sweeps.slots import Strategy
from sweeps.workload import Reading, Workload

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")


@dataclass(frozen=True)
class Memory:
    """Bytes that a trial needs in each of its processes.

    Attributes:
        n_parameters, n_trainable: of the whole network.
        weight_bytes, gradient_bytes, optimizer_bytes: what lies in each process; a share of it under "fsdp".
        gathered_bytes: whole blocks at work, under "fsdp".
        training_bytes: activations and all else alive in the worst moment of a training step, beyond weights, gradients and states.
        scoring_bytes: the same for scoring, where there are no gradients: keys and values, logits, one layer's activations. The states
            are there when dev is looked at; when the test sets are scored they make room, and count against it.
        prefix_bytes: of that, the keys and values of the shared prefix.
        base_bytes: the untouched model in fp32, in the host's memory.
        copying_bytes: its copy for the trial, in fp32 and in the host's memory until it is where and what it shall be.
        start_bytes: a copy of those of the base's weights that are trained, as they began, in the host's memory.
        importance_bytes: what each of them counts in a pull back there (EWC), in the host's memory.
        fisher_bytes: what it takes to find that out, on the device, beside the weights; before there are optimiser states.
        checkpoint_bytes: a copy of all trained weights, where one is selected on dev.
        n_workers: processes.
        n_teacher_parameters: of the teacher of a distillation.
        teacher_bytes: what it takes on the device, before the training and in place of it.
        loading_bytes: its weights in the host's memory, in place of the trial's copy.
        taught_bytes: what is kept of what it said, in the host's memory.
    """

    n_parameters: int
    n_trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    training_bytes: int
    scoring_bytes: int
    prefix_bytes: int
    base_bytes: int
    copying_bytes: int
    start_bytes: int
    checkpoint_bytes: int
    n_workers: int = 1
    n_teacher_parameters: int = 0
    teacher_bytes: int = 0
    loading_bytes: int = 0
    taught_bytes: int = 0
    importance_bytes: int = 0
    fisher_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Weights, gradients and optimiser states, which no smaller batch makes less."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes

    @property
    def device_bytes(self) -> int:
        """On the device of each process."""
        at_work = self.held_bytes + max(self.training_bytes, self.scoring_bytes - self.gradient_bytes)
        return max(self.teacher_bytes, self.weight_bytes + self.gathered_bytes + self.fisher_bytes, at_work)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, for each process of a trial on GPUs; a better checkpoint is copied before the old one goes."""
        at_start = self.start_bytes + self.importance_bytes
        at_work = self.taught_bytes + self.copying_bytes + at_start + 2 * self.checkpoint_bytes
        return self.base_bytes + max(self.loading_bytes, at_work)

    @property
    def cpu_bytes(self) -> int:
        """In the host's memory, for each process of a trial on CPUs."""
        second_checkpoint = self.checkpoint_bytes - self.gradient_bytes
        at_work = max(self.training_bytes, self.scoring_bytes - self.gradient_bytes, second_checkpoint)
        at_work += self.held_bytes + self.start_bytes + self.importance_bytes + self.checkpoint_bytes
        before = self.weight_bytes + self.gathered_bytes + self.start_bytes + self.fisher_bytes
        trained = self.taught_bytes + max(at_work, before, self.copying_bytes)
        taught = self.taught_bytes + max(self.teacher_bytes, self.taught_bytes)  # while it is read, or copied once it was
        return (0 if self.n_workers > 1 else self.base_bytes) + max(trained, self.loading_bytes, taught)


def estimate_memory(
    work: Workload, *, on_gpu: bool, n_workers: int = 1, strategy: Strategy = "none", micro_batch_tokens: int | None = None
) -> Memory:
    """What a trial of `work` needs, in each of `n_workers` processes that run it together.

    What the model's or the method's code cannot do without data raises what it raises.

    Args:
        on_gpu: its attention never holds the matrix of scores, and its optimiser steps all weights at once.
        strategy: "ddp" holds everything in each process, "fsdp" a share of it and the blocks at work.
        micro_batch_tokens: as for `llmft.runtime.Runtime`, whose default it is.
    """
    budget = micro_batch_tokens or Runtime().micro_batch_tokens
    spec, sharded = work.spec, strategy == "fsdp"
    method, n_labels = settle(spec).method, len(load_task(spec.task, spec.definition).labels)
    network = _build(spec, on_gpu)
    halved = max(map(_n_bytes, network.parameters())) // 2  # tensor by tensor
    n_parameters, base_bytes = sum(parameter.numel() for parameter in network.parameters()), _stored_bytes(network)
    if method.base_weights == "nf4":
        hold_in_4_bits(network)
        base_bytes = _stored_bytes(network)
    if method.trains:
        without_data = BorrowedModel(network, torch.device("meta"), spec.precision, plain_head=True)
        method.prepare(without_data, n_labels, torch.Generator().manual_seed(0))
        start = sum(_n_bytes(p) for name, p in network.named_parameters() if p.requires_grad and name in without_data.base_names)
    else:
        network.to(dtype=HALF.get(spec.precision))
        start = 0
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights, gradients = _stored_bytes(network), sum(map(_n_bytes, trainable))
    n_trainable, largest = sum(parameter.numel() for parameter in trainable), max(map(_n_bytes, trainable), default=0)
    gathered = 0
    if sharded:  # blocks are gathered in half; without, autocast casts the weights, and keeps the copies for the backward pass
        outside, blocks, gradients_at_work = _at_work(network)
        network.to(dtype=HALF.get(spec.precision))
        gathered = outside + blocks * _stored_bytes(network) // weights + gradients_at_work
    teacher = _build(spec, on_gpu, spec.teacher).to(dtype=HALF.get(spec.precision)) if work.lessons else None
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        taught = {} if teacher is None else _teach(work, method, teacher, meter, budget, n_workers, on_gpu, sharded)
        _fake(network)
        model = BorrowedModel(network, torch.device("cpu"), spec.precision, _has_plain_head(network))
        adapted = Adapted(method, model)
        weighing = _weigh(work, adapted, meter)
        training = _train(work, adapted, meter, budget, n_workers, torch.device("cuda" if on_gpu else "cpu"))
        prefix, scoring = _score(work, adapted, "scores", [work.scored], meter, budget)
        if work.lessons_again:
            scoring = max(scoring, _score(work, adapted, "targets", _longest(work.lessons_again), meter, budget)[1])
        looks = _score(work, adapted, "scores", work.looks, meter, budget)[1]
    if strategy == "ddp":
        training += gradients  # its buckets stay for the whole training
    elif on_gpu:
        training = max(training, gradients // (n_workers if sharded else 1))  # AdamW's own copy of its second moments
    else:
        training = max(training, 2 * largest)  # ... weight by weight
    itself = n_workers > 1 or not (on_gpu or method.trains or spec.precision in HALF)  # the base model is used, not a copy
    share = n_workers if sharded else 1
    states = sum(state_bytes(spec.train, parameter) for parameter in trainable) // share
    return Memory(
        n_parameters=n_parameters,
        n_trainable=n_trainable,
        weight_bytes=0 if itself and n_workers == 1 else weights // share,
        gradient_bytes=gradients // share,
        optimizer_bytes=states,
        gathered_bytes=gathered,
        training_bytes=training,
        scoring_bytes=max(looks, scoring - states),
        prefix_bytes=prefix,
        base_bytes=base_bytes,
        copying_bytes=0 if itself else base_bytes + (halved if spec.precision in HALF and not method.trains else 0),
        start_bytes=start // share,
        checkpoint_bytes=gradients // share if "best_dev" in spec.selections else 0,
        n_workers=n_workers,
        importance_bytes=start // share if method.n_fisher_samples else 0,
        fisher_bytes=weighing + 2 * gradients // share if method.n_fisher_samples else 0,
        **taught,
    )


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stored_bytes(network: torch.nn.Module) -> int:
    return sum(map(_n_bytes, [*network.parameters(), *network.buffers()]))


def _at_work(network: torch.nn.Module) -> tuple[int, int, int]:
    """What `fully_shard` has whole at a time: the weights outside of blocks, those of one block and the next, and gradients."""
    blocks = [list(block.parameters()) for block in find_blocks(network)]
    sizes = [(sum(map(_n_bytes, block)), sum(_n_bytes(p) for p in block if p.requires_grad)) for block in blocks]
    outside = _stored_bytes(network) - sum(size for size, _ in sizes)
    outside_trained = sum(_n_bytes(p) for p in network.parameters() if p.requires_grad) - sum(trained for _, trained in sizes)
    block, trained = max(sizes, default=(0, 0))
    return outside, 2 * block, outside_trained + trained


def _build(spec: TrialSpec, on_gpu: bool, ref: ModelRef | None = None) -> torch.nn.Module:
    """The network of `ref` (None: of the trial's model) in fp32 on the meta device, as `llmft.model` loads it."""
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


def _fake(network: torch.nn.Module) -> None:
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
def _has_plain_head(network: torch.nn.Module) -> bool:
    """What `llmft.model` finds by comparing logits, told by whether the network's own forward computes anything more."""
    ids, head = torch.zeros(1, 3, dtype=torch.long), network.get_output_embeddings()
    with Operations() as own:
        own_logits(network, ids)
    with Operations() as plain:
        head(last_states(network, ids))
    return +own.counts == +plain.counts


def _batch(
    work: Workload,
    model: BorrowedModel,
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


def _generate(model: BorrowedModel, batch: QueryBatch, n_new: int) -> None:
    """What `llmft.generate` needs the most: a pass over the prompts, and the last step, when all keys and values are there."""
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


def _weigh(work: Workload, adapted: Adapted, meter: Meter) -> int:
    """The Fisher information from the longest query, as in `llmft.fisher`; gives what is alive at the worst moment beyond weights,
    gradients and the sums of their squares."""
    if not adapted.method.n_fisher_samples:
        return 0
    longest = EncodedQueries(((0,) * (max(work.shots) - work.n_virtual_tokens),), (0,), work.start)
    evaluator = Evaluator(adapted, EncodedTrial((), {SHOTS: longest}, (), 0), work.words, Runtime())
    trained = [parameter for parameter in adapted.network.parameters() if parameter.requires_grad]
    before = meter.peak = meter.now
    sum_of_squares(evaluator, trained, 1, 0)
    return meter.peak - before - 2 * sum(map(_n_bytes, trained))


def _train(work: Workload, adapted: Adapted, meter: Meter, budget: int, n_workers: int, device: torch.device) -> int:
    """Forward and backward on the largest passes that a process may get, as in `llmft.train`; gives what is alive at the worst
    moment beyond weights and gradients. The optimiser's step is not run."""
    method, model = adapted.method, adapted.model
    if not method.trains:
        return 0
    groups = split_by_tokens(work.shots, budget)
    with torch.no_grad():
        method.begin(adapted, (_batch(work, model, [work.shots[i] - work.n_virtual_tokens for i in group]) for group in groups))
    if work.spec.train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.network.train()
    longest, completions = work.shots[::-1], work.completions[::-1]
    before = meter.peak = meter.now
    for group in _largest_passes(longest, work.spec.train.batch_size, budget, n_workers, device):
        ends = [completions[i] for i in group if completions]
        batch = _batch(work, model, [longest[i] - work.n_virtual_tokens for i in group], completions=ends)
        loss = adapted("loss", batch)
        loss.backward()
        del loss, batch
    gradients = [parameter.grad for parameter in model.network.parameters() if parameter.grad is not None]
    peak = meter.peak - before - sum(map(_n_bytes, gradients))
    for parameter in model.network.parameters():
        parameter.grad = None
    return peak


def _largest_passes(
    lengths: Sequence[int], batch_size: int, budget: int, n_workers: int, device: torch.device
) -> list[list[int]]:
    """The first pass of a step, and the largest after it, when the gradients are there already: of the step that has the largest.

    Args:
        lengths: tokens of all that is trained on, the longest first.

    Returns:
        Places in `lengths`.
    """
    if n_workers > 1:
        mine = range(len(lengths))[:batch_size:n_workers]
        return [[mine[i] for i in group] for group in split_by_tokens([lengths[i] for i in mine], budget)[:2]]
    passes = hardest_step(lengths, batch_size, budget, device)
    return [passes[0], max(passes[1:], key=lambda group: lengths[group[0]] * len(group))] if len(passes) > 1 else passes


@torch.no_grad()
def _score(
    work: Workload, adapted: Adapted, what: str, readings: Sequence[Reading], meter: Meter, budget: int
) -> tuple[int, int]:
    """Score as in `llmft.evaluate`, `what` a method's hook; gives the bytes of the longest shared prefix, and all that is alive at
    the worst moment beyond weights."""
    adapted.network.eval()
    before, prefix_bytes = meter.now, 0
    meter.peak = before
    for reading in readings:
        prefix = _encode_prefix(adapted.model, reading.prefix) if reading.shared else None
        if prefix and reading.n_new_tokens:  # rows that go on generating get copies
            prefix = replace(prefix, is_shared=False)
        prefix_bytes = max(prefix_bytes, sum(_n_bytes(t) for layer in (prefix.layers if prefix else ()) for t in layer))
        pass_budget, overhead = scoring_budget(budget, prefix)
        besides = reading.n_virtual_tokens + reading.n_new_tokens + overhead
        for n, length in reading.largest_batches(budget, overhead) if reading.n_new_tokens else ():
            batch = _batch(replace(work, words=None), adapted.model, [length - besides] * n, prefix)
            with adapted.model.autocast():
                _generate(adapted.model, adapted.method.condition(adapted.model, batch), reading.n_new_tokens)
        for n, length in reading.largest_batches(pass_budget, overhead) if work.words else ():
            adapted(what, _batch(work, adapted.model, [length - besides + reading.n_new_tokens] * n, prefix))
    return prefix_bytes, meter.peak - before


def _longest(lessons: Sequence[Reading]) -> list[Reading]:
    return sorted(lessons, key=lambda lesson: lesson.prefix)[-2:]


def _encode_prefix(model: BorrowedModel, length: int) -> Prefix:
    """As `llmft.shared_prefix.encode_shared`, which compares numbers besides."""
    with model.autocast():
        prefix = encode_prefix(model, (0,) * length)
        again = read_shared(model.network, torch.zeros(2, 4, dtype=torch.long), prefix)
    return replace(prefix, is_shared=again is not None)


def _teach(
    work: Workload, method: Method, network: torch.nn.Module, meter: Meter, budget: int, n_workers: int, on_gpu: bool, sharded: bool
) -> dict[str, int]:  # fmt: skip
    """Have the teacher's `network` read the longest lessons as in `llmft.teacher`, and give the method what it was taught."""
    n_parameters, in_half = sum(p.numel() for p in network.parameters()), work.spec.precision in HALF
    weights, at_work = _stored_bytes(network), sum(_at_work(network)) if sharded else 0
    halved = max(map(_n_bytes, network.parameters())) if in_half else 0  # tensor by tensor
    _fake(network)
    model = BorrowedModel(network, torch.device("cpu"), work.spec.precision, _has_plain_head(network))
    adapted = Adapted(Untouched(method), model)
    _, peak = _score(replace(work, start=work.teacher_start), adapted, "targets", _longest(work.lessons), meter, budget)
    with torch.no_grad():  # texts weigh nothing
        said = adapted("targets", _batch(work, model, [1])) if work.words else {}
    method.taught = {name: rows.new_zeros(len(work.shots), *rows.shape[1:]) for name, rows in said.items()}
    is_itself = work.spec.teacher is None
    borrowed = is_itself and n_workers == 1 and not on_gpu and not in_half  # the base model itself reads
    own = weights // (n_workers if sharded else 1) + at_work
    return {
        "n_teacher_parameters": n_parameters,
        "teacher_bytes": peak + (0 if borrowed else own),
        "loading_bytes": 0 if borrowed or (is_itself and n_workers > 1) else 4 * n_parameters + halved,
        "taught_bytes": sum(map(_n_bytes, method.taught.values())),
    }
