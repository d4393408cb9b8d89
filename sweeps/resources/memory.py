"""Estimate the memory that a trial needs: weights are counted, activations follow from one formula.

Parameters, gradients and optimizer states are counted exactly, on the network as the method has prepared it on the meta device
(`sweeps.resources.network_sizes`). What a forward pass of T tokens, in queries padded to s tokens, keeps for the backward pass is in each
transformer block

    T [2 h + 2 h + 2 k + 2 h + c f] numbers and 2 T h bytes,

with the width h, the width of keys and values k and that of the feed-forward layer f: the inputs of both norms (in fp32); queries, keys,
values and the attention's output; the inputs of the linear layers; what the activation function keeps (c from 1 to 5); the masks of
dropout. This is equation (1) of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198) without its matrix of attention scores, a s T
numbers for a heads, which fused attention never holds; where it is not fused, it is added. Linear layers with frozen weights keep no
input, but layers that a method adds do; blocks below the lowest trained weight keep nothing. With gradient checkpointing a block keeps its
input, T h numbers in fp32, and one block at a time all of the above. To that come the block at work, three rows of the vocabulary in fp32
for every token that is predicted (logits, log-softmax, gradient), and under autocast the weights in half precision.

Whoever asks whether a trial fits must leave room for what kernels and allocators take besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmft.runtime import Runtime
from sweeps.resources.slots import ShardingStrategy

if TYPE_CHECKING:
    from sweeps.resources.network_sizes import NetworkSizes
    from sweeps.resources.workload import ScoredPrompts, Workload

LOGITS, WORKING_WIDTHS = 3, 5
"""Rows of the vocabulary for a predicted token, and tensors as wide as the network in the block at work."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a trial needs in each of its processes.

    Attributes:
        n_parameters, n_trainable: of the whole network.
        weight_bytes, gradient_bytes, optimizer_bytes: what lies in each process; a share of it under "fsdp".
        gathered_bytes: whole blocks at work, under "fsdp".
        training_bytes: activations, and all else beyond weights, gradients and states, at the worst moment of a training step.
        scoring_bytes: the same for scoring, where there are no gradients.
        base_bytes: the untouched model, in the host's memory.
        copy_bytes: its copy for the trial, in the host's memory until it is moved to a device.
        start_bytes: the weights of the base that are trained as they began, and their Fisher information, in the host's memory.
        checkpoint_bytes: a copy of all trained weights, where one is selected on dev, in the host's memory.
        n_workers: processes.
        n_teacher_parameters: of the teacher of a distillation.
        teacher_bytes: what the teacher takes on the device, before the training and in place of it.
        loading_bytes: its weights in the host's memory, in place of the trial's copy.
        taught_bytes: upper bound of the teacher's targets, in the host's memory.
        measured_bytes: the highest peak that a trial alike has had, 0 where none has ended.
    """

    n_parameters: int = 0
    n_trainable: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    gathered_bytes: int = 0
    training_bytes: int = 0
    scoring_bytes: int = 0
    base_bytes: int = 0
    copy_bytes: int = 0
    start_bytes: int = 0
    checkpoint_bytes: int = 0
    n_workers: int = 1
    n_teacher_parameters: int = 0
    teacher_bytes: int = 0
    loading_bytes: int = 0
    taught_bytes: int = 0
    measured_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Weights, gradients and optimizer states, which no smaller batch makes less."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes

    @property
    def working_bytes(self) -> int:
        """`held_bytes` and the most that training or scoring adds."""
        return self.held_bytes + max(self.training_bytes, self.scoring_bytes - self.gradient_bytes)

    @property
    def device_bytes(self) -> int:
        """On the device of each process."""
        return max(self.teacher_bytes, self.working_bytes, self.measured_bytes)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, for each process on a GPU; a better checkpoint is copied before the old one goes."""
        trained = self.taught_bytes + self.copy_bytes + self.start_bytes + 2 * self.checkpoint_bytes
        return self.base_bytes + max(self.loading_bytes, trained)

    @property
    def cpu_bytes(self) -> int:
        """In the host's memory, for each process that computes on CPUs."""
        second_checkpoint = self.checkpoint_bytes - self.gradient_bytes - self.training_bytes
        trained = self.working_bytes + self.start_bytes + self.checkpoint_bytes + max(0, second_checkpoint)
        taught = self.taught_bytes + max(self.teacher_bytes, self.taught_bytes, trained, self.copy_bytes)
        base = 0 if self.n_workers > 1 else self.base_bytes
        return base + max(self.loading_bytes, taught, self.measured_bytes)


@dataclass(frozen=True)
class _Activations:
    """The formula, for one network, its workload and how it is run."""

    sizes: NetworkSizes
    work: Workload
    budget: int
    n_workers: int
    on_gpu: bool

    def is_fused(self, training: bool) -> bool:
        """Whether attention holds no matrix of scores. On CPUs, PyTorch's fused attention has no dropout."""
        return not (self.sizes.is_eager or (training and not self.on_gpu and self.sizes.has_attention_dropout))

    def kept_in_block(self, n_tokens: int, length: int) -> int:
        """What one block keeps of `n_tokens`, in queries of `length`, for its backward pass."""
        sizes, number = self.sizes, self.sizes.number_bytes
        inputs = 2 * sizes.width if sizes.trains_matrices else max(sizes.width, sizes.added_width)
        values = 2 * sizes.width + 2 * sizes.kv_width + inputs + sizes.n_inner * sizes.inner_width
        matrix = 0 if self.is_fused(training=True) else (2 * number + 1) * sizes.n_heads * length
        return n_tokens * (4 * 2 * sizes.width + number * values + 2 * sizes.width * sizes.has_dropout + matrix)

    def at_work(self, n_tokens: int, length: int, training: bool) -> int:
        """What one block holds at a time, of tensors that are not kept."""
        sizes = self.sizes
        inner = (3 if sizes.n_inner > 3 else 2) * sizes.inner_width
        matrix = 0 if self.is_fused(training) else 2 * sizes.n_heads * length
        return n_tokens * sizes.number_bytes * (WORKING_WIDTHS * sizes.width + max(inner, matrix))

    def cast_bytes(self, training: bool) -> int:
        """Copies in half precision that autocast holds: of the output embedding, and of weights that a backward pass needs."""
        sizes = self.sizes
        if not (sizes.is_half and sizes.n_trainable):
            return 0
        return 2 * sizes.n_embedded + (2 * sizes.n_block_parameters if training or sizes.trains_matrices else 0)

    def training_bytes(self) -> int:
        """The most that a training step holds beyond weights, gradients and states, before the optimizer's step."""
        import torch

        from llmft.models import largest_training_step

        sizes, train, lengths = self.sizes, self.work.spec.train, self.work.shots[::-1]
        if not lengths:
            return 0
        embedding = 4 * sizes.n_embedded if sizes.trains_input else 0  # its gradient, until it is added to that of the step
        device = torch.device("cuda" if self.on_gpu else "cpu")
        passes = largest_training_step(lengths, train.batch_size, self.budget, device, self.n_workers)
        first, *later = (embedding + self.pass_bytes(group) for group in passes)
        at_end = (3 if sizes.is_tied else 1) * embedding - (0 if later else embedding)
        return self.cast_bytes(training=True) + max(first - sizes.gradient_bytes, at_end, *later)

    def pass_bytes(self, group: list[int]) -> int:
        """What a forward pass over the examples at these ranks, the longest first, holds when it ends."""
        sizes, work, n_rows = self.sizes, self.work, self.work.rows_per_query
        length, n_tokens = work.shots[-1 - group[0]], len(group) * work.shots[-1 - group[0]]
        n_predicted = len(group) * (work.n_word_tokens if n_rows > 1 else 1)
        if work.completions:
            n_predicted = sum(work.completions[-1 - rank] for rank in group)
        n_encoded = n_tokens if sizes.n_decoder_blocks else n_tokens * n_rows
        kept = [self.kept_in_block(n_encoded, length)] * (sizes.depth - sizes.n_decoder_blocks)
        across = 2 * n_tokens * sizes.kv_width * sizes.number_bytes  # keys and values of what the encoder read
        kept += [self.kept_in_block(n_predicted, 1) + across] * sizes.n_decoder_blocks
        if not (sizes.trains_input or work.dev.n_virtual_tokens):
            kept = kept[sizes.depth - sizes.n_above :]
        if work.spec.train.gradient_checkpointing and kept:
            kept = [max(kept), 4 * n_encoded * sizes.width * len(kept)]
        return sum(kept) + self.at_work(n_encoded, length, training=True) + LOGITS * 4 * sizes.n_words * n_predicted

    def scoring_bytes(self, prompts: ScoredPrompts) -> int:
        """The most that scoring, or generating, holds beyond the weights: one block at work, logits, keys and values."""
        from llmft.models import query_budget

        sizes, n_new = self.sizes, prompts.n_new_tokens
        prefix, kv_bytes = (
            prompts.prefix if prompts.shared else 0,
            2 * sizes.kv_width * (sizes.n_decoder_blocks or sizes.depth) * sizes.number_bytes,
        )
        copied = prefix if n_new or not sizes.shares_prefix else 0
        budget = self.budget if n_new or copied else query_budget(self.budget, prefix)
        longest = max((max(each.sample) for each in prompts.sets), default=0) + prompts.n_before
        n_queries = max((min(each.n, max(1, budget // (longest + copied))) for each in prompts.sets), default=0)
        n_rows = n_queries * self.work.rows_per_query
        queries, logits = self.at_work(n_rows * (longest - n_new), longest, training=False), 2 * 4 * sizes.n_words * n_queries
        if copied or n_new:  # keys and values of every row: of the prompts in their pass, and of all when the last token is generated
            queries = max(queries + n_rows * (longest - n_new + copied) * kv_bytes, n_rows * (longest + copied) * kv_bytes)
        return self.cast_bytes(training=False) + prefix * kv_bytes + max(self.at_work(prefix, prefix, training=False), queries + logits)


def estimate_memory(
    work: Workload,
    networks: tuple[NetworkSizes, NetworkSizes | None],
    *,
    on_gpu: bool,
    n_workers: int = 1,
    strategy: ShardingStrategy = "none",
    micro_batch_tokens: int | None = None,
) -> Memory:
    """Estimate what a trial of `work` needs, in each of `n_workers` processes that run it together.

    Args:
        networks: of the trial and of its teacher, from `count_networks`.
        on_gpu: its attention is fused also with dropout, and its optimizer steps all weights at once.
        strategy: "ddp" holds everything in each process, "fsdp" a share of it and the blocks at work.
        micro_batch_tokens: as for `llmft.runtime.Runtime`, whose default it is.
    """
    budget, spec = micro_batch_tokens or Runtime().micro_batch_tokens, work.spec
    (sizes, reader), share = networks, n_workers if strategy == "fsdp" else 1
    activations, gradients = _Activations(sizes, work, budget, n_workers, on_gpu), sizes.gradient_bytes
    training = activations.training_bytes() + (gradients if strategy == "ddp" else 0)  # its buckets
    step = gradients // share if on_gpu else 2 * sizes.largest_gradient_bytes  # AdamW's copy of its second moments
    in_place = n_workers > 1 or not (on_gpu or sizes.n_trainable or sizes.is_half)  # the base model is used, not a copy
    halved = sizes.largest_bytes // 2 if sizes.is_half and not sizes.n_trainable else 0  # tensor by tensor
    teacher = {}
    if reader:
        reads = _Activations(reader, work, budget, n_workers, on_gpu)
        weights = reader.weight_bytes // share + (reader.gathered_bytes if share > 1 else 0)
        teacher = {
            "n_teacher_parameters": reader.n_parameters,
            "teacher_bytes": weights + max(map(reads.scoring_bytes, work.teacher)),
            "loading_bytes": reader.base_bytes + (reader.largest_bytes // 2 if reader.is_half else 0),
            "taught_bytes": 4 * len(work.shots) * reader.n_words if spec.settings.get("over") == "vocabulary" else 0,
        }
    return Memory(
        n_parameters=sizes.n_parameters,
        n_trainable=sizes.n_trainable,
        weight_bytes=0 if in_place and n_workers == 1 else sizes.weight_bytes // share,
        gradient_bytes=gradients // share,
        optimizer_bytes=sizes.optimizer_bytes // share,
        gathered_bytes=sizes.gathered_bytes if share > 1 else 0,
        training_bytes=max(training, step) if sizes.n_trainable else 0,
        scoring_bytes=max(map(activations.scoring_bytes, (work.dev, work.tests))),
        base_bytes=sizes.base_bytes,
        copy_bytes=0 if in_place else sizes.base_bytes + halved,
        start_bytes=(2 if work.n_fisher_samples else 1) * sizes.start_bytes // share,
        checkpoint_bytes=gradients // share if "best_dev" in spec.selections else 0,
        n_workers=n_workers,
        **teacher,
    )
