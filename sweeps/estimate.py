"""What a plan will take: time from trials that have ended, memory from the model's shape. Nothing is invented where nothing is known."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sweeps.schedule import CellState, Records

if TYPE_CHECKING:
    from sweeps.cells import Cell

ACTIVATION_BYTES = 68
"""Per token, layer and unit of width, kept for the backward pass in fp32: twice the 34 bytes in half precision of Korthikanti et al. 2022, eq. 1, attention scores left out."""


def remaining_s(states: Iterable[CellState], records: Records, concurrency: int) -> float | None:
    """Estimate of the seconds to the end: the trials that are left, at the mean duration of trials like them.

    Like them means: same model, task, method and shots; else same model, task and method; else same model. None if some cell
    has no trial even of its model to go by.
    """
    durations: dict[tuple, list[float]] = defaultdict(list)
    for record in records.values():
        if record.finished and record.cost:
            spec = record.spec
            for key in _keys(spec):
                durations[key].append(record.cost.wall_s)
    seconds = 0.0
    for state in states:
        n_left = state.total - state.n_done
        like = next((durations[key] for key in _keys(state.cell.base) if key in durations), None)
        if n_left and like is None:
            return None
        seconds += n_left * statistics.fmean(like) if n_left else 0.0
    return seconds / max(1, concurrency)


def _keys(spec) -> list[tuple]:
    model = spec.model.name
    return [(model, spec.task, spec.method, spec.n_shots), (model, spec.task, spec.method), (model,)]


@dataclass(frozen=True)
class Memory:
    """Bytes that one trial needs on its device, without activations; `activation_bytes` is for a whole micro-batch in training.

    `n_trainable` is None where it cannot be told without the weights; then every parameter is taken to be trained.
    """

    n_parameters: int
    n_trainable: int | None
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def fixed_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def estimate_memory(cell: Cell, micro_batch_tokens: int) -> Memory:
    """A rough estimate from the model's configuration alone: the network is built without its weights.

    Args:
        cell: model, method and task.
        micro_batch_tokens: tokens in one forward pass.

    Raises:
        UserError: the configuration cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llmft.model import BorrowedModel, load_config
    from llmft.registry import build_method, load_task

    spec, config = cell.base, load_config(cell.base.model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    method, n_trainable = build_method(spec.method, spec.settings), 0
    if method.trains:
        model = BorrowedModel(network, torch.device("meta"), spec.precision, plain_head=True)
        try:
            method.prepare(model, len(load_task(spec.task).labels), torch.Generator().manual_seed(0))
            n_trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        except Exception:  # some methods need real weights to prepare
            n_trainable = None
    n_updated = n_parameters if n_trainable is None else n_trainable
    half = spec.precision != "fp32" and not method.trains
    tokens = min(micro_batch_tokens, spec.train.batch_size * (spec.max_length or micro_batch_tokens))
    width, depth = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    return Memory(
        n_parameters=n_parameters,
        n_trainable=n_trainable,
        weight_bytes=(2 if half else 4) * n_parameters,
        gradient_bytes=4 * n_updated,
        optimizer_bytes=8 * n_updated,
        activation_bytes=ACTIVATION_BYTES * tokens * width * depth if method.trains else 0,
    )
