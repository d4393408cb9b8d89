"""The memory that a trial needs, from its own code run on tensors without data: any architecture and method, no weights needed.

The network is built from its configuration in PyTorch's fake-tensor mode, which knows shapes and types alone, and does what a
trial does: a training step on its longest batch, and scoring. A dispatch mode adds up the storages that are alive. What that
cannot see is inside of kernels and allocators; whoever asks whether a trial fits must leave room for it.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmft.architecture import DROPOUT, language_model, last_states, own_logits
from llmft.batches import Prefix, QueryBatch, encode_prefix, make_batch, split_by_tokens
from llmft.method import Method
from llmft.model import BorrowedModel, load_config
from llmft.optimizers import state_bytes
from llmft.registry import build_method, load_task
from llmft.runtime import Runtime
from llmft.spec import TrialSpec
from llmft.tokens import EncodedQueries
from sweeps.packed import hold_in_4_bits
from sweeps.slots import Strategy
from sweeps.workload import Workload

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
        scoring_bytes: the same for scoring, where there are no gradients: keys and values, logits, one layer's activations.
        prefix_bytes: of that, the keys and values of the shared prefix.
        base_bytes: the untouched model in fp32, in the host's memory.
        copying_bytes: its copy for the trial, in fp32 and in the host's memory until it is where and what it shall be.
        checkpoint_bytes: a copy of the trained weights in the host's memory, where one is selected on dev.
        n_workers: processes.
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
    checkpoint_bytes: int
    n_workers: int = 1

    @property
    def held_bytes(self) -> int:
        """Weights, gradients and optimiser states, which no smaller batch makes less."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes

    @property
    def device_bytes(self) -> int:
        """On the device of each process."""
        return self.held_bytes + max(self.training_bytes, self.scoring_bytes - self.gradient_bytes)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, for each process of a trial on GPUs; a better checkpoint is copied before the old one goes."""
        return self.base_bytes + self.copying_bytes + 2 * self.checkpoint_bytes

    @property
    def cpu_bytes(self) -> int:
        """In the host's memory, for each process of a trial on CPUs."""
        second_checkpoint = self.checkpoint_bytes - self.gradient_bytes
        at_work = max(self.training_bytes, self.scoring_bytes - self.gradient_bytes, second_checkpoint)
        at_work += self.held_bytes + self.checkpoint_bytes
        return (0 if self.n_workers > 1 else self.base_bytes) + max(at_work, self.copying_bytes)


class Meter(TorchDispatchMode):
    """Adds up the bytes of every storage that is made inside and still alive; `peak` is the most since it was set last."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


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
    method, n_labels = build_method(spec.method, spec.settings), len(load_task(spec.task, spec.definition).labels)
    network = _build(spec, on_gpu)
    halved = max(map(_n_bytes, network.parameters())) // 2  # tensor by tensor
    n_parameters, base_bytes = sum(parameter.numel() for parameter in network.parameters()), _stored_bytes(network)
    if method.base_weights == "nf4":
        hold_in_4_bits(network)
        base_bytes = _stored_bytes(network)
    if method.trains:
        without_data = BorrowedModel(network, torch.device("meta"), spec.precision, plain_head=True)
        method.prepare(without_data, n_labels, torch.Generator().manual_seed(0))
    else:
        network.to(dtype=HALF.get(spec.precision))
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights, gradients = _stored_bytes(network), sum(map(_n_bytes, trainable))
    n_trainable, largest = sum(parameter.numel() for parameter in trainable), max(map(_n_bytes, trainable), default=0)
    gathered = 0
    if sharded:  # blocks are gathered in half; without, autocast casts the weights, and keeps the copies for the backward pass
        outside, blocks, gradients_at_work = _at_work(network)
        network.to(dtype=HALF.get(spec.precision))
        gathered = outside + blocks * _stored_bytes(network) // weights + gradients_at_work
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        _fake(network)
        model = BorrowedModel(network, torch.device("cpu"), spec.precision, _has_plain_head(network))
        training = _train(work, method, model, meter, budget, n_workers)
        prefix, scoring = _score(work, method, model, meter, budget)
    if strategy == "ddp":
        training += gradients  # its buckets stay for the whole training
    elif on_gpu:
        training = max(training, gradients // (n_workers if sharded else 1))  # AdamW's own copy of its second moments
    else:
        training = max(training, 2 * largest)  # ... weight by weight
    itself = n_workers > 1 or not (on_gpu or method.trains or spec.precision in HALF)  # the base model is used, not a copy
    share = n_workers if sharded else 1
    return Memory(
        n_parameters=n_parameters,
        n_trainable=n_trainable,
        weight_bytes=0 if itself and n_workers == 1 else weights // share,
        gradient_bytes=gradients // share,
        optimizer_bytes=sum(state_bytes(spec.train, parameter) for parameter in trainable) // share,
        gathered_bytes=gathered,
        training_bytes=training,
        scoring_bytes=scoring,
        prefix_bytes=prefix,
        base_bytes=base_bytes,
        copying_bytes=0 if itself else base_bytes + (halved if spec.precision in HALF and not method.trains else 0),
        checkpoint_bytes=gradients // share if "best_dev" in spec.selections else 0,
        n_workers=n_workers,
    )


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stored_bytes(network: torch.nn.Module) -> int:
    return sum(map(_n_bytes, [*network.parameters(), *network.buffers()]))


def _at_work(network: torch.nn.Module) -> tuple[int, int, int]:
    """What `fully_shard` has whole at a time: the weights outside of blocks, those of one block and the next, and gradients."""
    names = set(network._no_split_modules or ())
    blocks = [list(block.parameters()) for block in network.modules() if type(block).__name__ in names]
    sizes = [(sum(map(_n_bytes, block)), sum(_n_bytes(p) for p in block if p.requires_grad)) for block in blocks]
    outside = _stored_bytes(network) - sum(size for size, _ in sizes)
    outside_trained = sum(_n_bytes(p) for p in network.parameters() if p.requires_grad) - sum(trained for _, trained in sizes)
    block, trained = max(sizes, default=(0, 0))
    return outside, 2 * block, outside_trained + trained


def _build(spec: TrialSpec, on_gpu: bool) -> torch.nn.Module:
    """The network in fp32 on the meta device, as `llmft.model` loads it."""
    config, changed = copy.deepcopy(load_config(spec.model)), {}
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


class _Operations(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func] += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _has_plain_head(network: torch.nn.Module) -> bool:
    """What `llmft.model` finds by comparing logits, told by whether the network's own forward computes anything more."""
    ids, head = torch.zeros(1, 3, dtype=torch.long), network.get_output_embeddings()
    with _Operations() as own:
        own_logits(network, ids)
    with _Operations() as plain:
        head(last_states(network, ids))
    return +own.counts == +plain.counts


def _batch(work: Workload, model: BorrowedModel, lengths: Sequence[int], prefix: Prefix | None = None) -> QueryBatch:
    """A batch of prompts of these lengths; which tokens they have does not matter."""
    queries = EncodedQueries(tuple((0,) * length for length in lengths), (0,) * len(lengths), work.start)
    return make_batch(queries, range(len(lengths)), work.words, model, prefix)


def _train(work: Workload, method: Method, model: BorrowedModel, meter: Meter, budget: int, n_workers: int) -> int:
    """Forward and backward on the longest batch that a process may get, as in `llmft.train`; gives what is alive at the worst
    moment beyond weights and gradients. The optimiser's step is not run."""
    if not method.trains:
        return 0
    if work.spec.train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.network.train()
    longest = [work.prefix + length for length in sorted(work.shots, reverse=True)[: work.spec.train.batch_size]]
    mine = longest[::n_workers]
    before = meter.peak = meter.now
    for group in split_by_tokens(mine, budget)[:2]:  # in the second pass the gradients are there already
        batch = _batch(work, model, [mine[i] for i in group])
        with model.autocast():
            loss = method.loss(model, batch)
        loss.backward()
        del loss, batch
    gradients = [parameter.grad for parameter in model.network.parameters() if parameter.grad is not None]
    peak = meter.peak - before - sum(map(_n_bytes, gradients))
    for parameter in model.network.parameters():
        parameter.grad = None
    return peak


@torch.no_grad()
def _score(work: Workload, method: Method, model: BorrowedModel, meter: Meter, budget: int) -> tuple[int, int]:
    """Score as in `llmft.evaluate`; gives the bytes of the shared prefix, and all that is alive at the worst moment beyond weights."""
    model.network.eval()
    before, prefix = meter.now, None
    meter.peak = before
    with model.autocast():
        if work.shares_prefix:
            prefix = encode_prefix(model, (0,) * work.prefix)
        for n, length in work.largest_batches(budget):
            method.scores(model, _batch(work, model, [length - (work.prefix if prefix else 0)] * n, prefix))
    return sum(_n_bytes(tensor) for layer in (prefix.layers if prefix else ()) for tensor in layer), meter.peak - before
