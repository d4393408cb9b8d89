"""The memory that a trial needs, told by doing what it does on tensors without data (`sweeps.resources.dry_run`): for any architecture and
method, without the weights.

A meter adds up the storages that are alive. What it cannot see is inside of kernels and allocators; whoever asks whether a trial
fits must leave room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmft.methods import build_method
from llmft.models import AdaptedModel, LoadedModel, find_blocks
from llmft.runtime import Runtime
from llmft.tasks import load_task
from llmft.training import state_bytes
from llmft.trial import PreparedTrial, prepare_trial
from sweeps.resources.dry_run import batch_of, build, fake, has_plain_head, score, train, weigh
from sweeps.resources.slots import ShardingStrategy
from sweeps.resources.tensor_meter import Meter, hold_in_4_bits
from sweeps.resources.workload import Reading, Workload

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    work: Workload, *, on_gpu: bool, n_workers: int = 1, strategy: ShardingStrategy = "none", micro_batch_tokens: int | None = None
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
    trial = prepare_trial(spec)
    method, n_labels = trial.method, len(load_task(spec.task, spec.definition).labels)
    network = build(spec, on_gpu)
    halved = max(map(_n_bytes, network.parameters())) // 2  # tensor by tensor
    n_parameters, base_bytes = sum(parameter.numel() for parameter in network.parameters()), _stored_bytes(network)
    if method.base_weights == "nf4":
        hold_in_4_bits(network)
        base_bytes = _stored_bytes(network)
    if method.trains:
        without_data = LoadedModel(network, torch.device("meta"), spec.precision, plain_head=True)
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
    teacher = build(spec, on_gpu, spec.teacher).to(dtype=HALF.get(spec.precision)) if work.lessons else None
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        taught = {} if teacher is None else _teach(work, trial, teacher, meter, budget, n_workers, on_gpu, sharded)
        fake(network)
        model = LoadedModel(network, torch.device("cpu"), spec.precision, has_plain_head(network))
        adapted = AdaptedModel(method, model)
        weighing = weigh(work, adapted, meter)
        training = train(work, adapted, meter, budget, n_workers, torch.device("cuda" if on_gpu else "cpu"))
        prefix, scoring = score(work, adapted, method.scores, [work.scored], meter, budget)
        if work.lessons_again:
            scoring = max(scoring, score(work, adapted, trial.recipe.teacher.targets, _longest(work.lessons_again), meter, budget)[1])
        looks = score(work, adapted, method.scores, work.looks, meter, budget)[1]
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
        importance_bytes=start // share if work.n_fisher_samples else 0,
        fisher_bytes=weighing + 2 * gradients // share if work.n_fisher_samples else 0,
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


def _longest(lessons: Sequence[Reading]) -> list[Reading]:
    return sorted(lessons, key=lambda lesson: lesson.prefix)[-2:]


def _teach(
    work: Workload, trial: PreparedTrial, network: torch.nn.Module, meter: Meter, budget: int, n_workers: int, on_gpu: bool, sharded: bool
) -> dict[str, int]:  # fmt: skip
    """Have the teacher's `network` read the longest lessons as in `llmft.trial.distillation`, and give the method what it was taught."""
    n_parameters, in_half = sum(p.numel() for p in network.parameters()), work.spec.precision in HALF
    weights, at_work = _stored_bytes(network), sum(_at_work(network)) if sharded else 0
    halved = max(map(_n_bytes, network.parameters())) if in_half else 0  # tensor by tensor
    fake(network)
    model = LoadedModel(network, torch.device("cpu"), work.spec.precision, has_plain_head(network))
    adapted = AdaptedModel(build_method("zero_shot", {}), model)
    _, peak = score(replace(work, start=work.teacher_start), adapted, trial.recipe.teacher.targets, _longest(work.lessons), meter, budget)
    with torch.no_grad():  # texts weigh nothing
        said = adapted(trial.recipe.teacher.targets, batch_of(work, model, [1])) if work.words else {}
    targets = trial.method.teacher_targets = {name: rows.new_zeros(len(work.shots), *rows.shape[1:]) for name, rows in said.items()}
    is_itself = work.spec.teacher is None
    borrowed = is_itself and n_workers == 1 and not on_gpu and not in_half  # the base model itself reads
    own = weights // (n_workers if sharded else 1) + at_work
    return {
        "n_teacher_parameters": n_parameters,
        "teacher_bytes": peak + (0 if borrowed else own),
        "loading_bytes": 0 if borrowed or (is_itself and n_workers > 1) else 4 * n_parameters + halved,
        "taught_bytes": sum(map(_n_bytes, targets.values())),
    }
