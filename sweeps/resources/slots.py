"""What one trial gets, and whose turn it is when trials with different needs share a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

ShardingStrategy = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class ResourceRequest:
    """What one trial gets.

    Attributes:
        n_workers: processes that run it together: one, in the worker itself, or a group.
        cpus, gpus: for each of them; `gpus` below 1 is a share.
        strategy: how a group trains: "ddp" (a whole model in each) or "fsdp" (a part in each); "none" for a single process.
        micro_batch_tokens: upper bound of tokens in one forward pass where the usual one would not fit; None: the usual.
    """

    n_workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    strategy: ShardingStrategy = "none"
    micro_batch_tokens: int | None = None

    @property
    def total_cpus(self) -> int:
        return self.n_workers * self.cpus

    @property
    def total_gpus(self) -> float:
        return self.n_workers * self.gpus

    @property
    def whole_gpus(self) -> Fraction:
        """GPUs as they are shared out: with 0.4 of one, two trials fit, so that each takes a half."""
        return Fraction(1, int(1 / self.gpus)) if 0 < self.gpus < 1 else Fraction(round(self.total_gpus))

    def n_fitting(self, n_cpus: float | Fraction | None, n_gpus: float | Fraction) -> int:
        """How many trials with this slot fit at a time; with `n_cpus` None as far as the GPUs are concerned."""
        room = [math.floor(n_gpus / self.whole_gpus)] if self.gpus else []
        room += [math.floor(n_cpus / self.total_cpus)] if n_cpus is not None else []
        return max(0, min(room))

    def __str__(self) -> str:
        unit = f"{self.total_gpus:.3g} GPU" if self.gpus else f"{self.total_cpus} CPU"
        several = "s" if max(self.total_gpus, 0 if self.gpus else self.total_cpus) > 1 else ""
        group = f", {self.strategy}" if self.n_workers > 1 else ""
        return f"{unit}{several}{group}" + (f", passes of {self.micro_batch_tokens} tokens" if self.micro_batch_tokens else "")


def trials_to_start(
    n_cpus: float,
    n_gpus: float,
    in_flight: Mapping[ResourceRequest, int],
    ready: Mapping[ResourceRequest, int],
    limit: int | None = None,
    ahead: int = 0,
) -> dict[ResourceRequest, int]:
    """How many more trials of each slot may be handed out now.

    Slots come in descending order of their GPUs, then CPUs. Each wants as many trials in flight as it has, in flight and ready, and
    as fit into what larger ones leave; that is kept for it before smaller ones get the rest. So a large trial waits at most for
    the small ones that are in flight already, and small ones fill what is left.

    Args:
        n_cpus, n_gpus: of all nodes that are there now.
        in_flight, ready: trials handed out that have not ended, and trials that could start, by slot.
        limit: trials in flight at the most, of all slots together.
        ahead: trials of a slot handed out beyond what there is room for, so that an autoscaler sees them; nothing is kept for
            them. Where a larger slot has trials and room, there are none: they would take its place, piece by piece.
    """
    cpus, gpus, more = Fraction(n_cpus), Fraction(n_gpus), {}
    room = math.inf if limit is None else limit - sum(in_flight.values())
    for slot in sorted({*in_flight, *ready}, key=_size, reverse=True):
        flying, waiting = in_flight.get(slot, 0), ready.get(slot, 0)
        wanted = min(flying + waiting, slot.n_fitting(cpus, gpus))
        cpus, gpus = cpus - wanted * slot.total_cpus, gpus - wanted * slot.whole_gpus
        more[slot] = int(max(0, min(wanted + ahead - flying, waiting, room)))
        room -= more[slot]
        if flying + waiting and slot.n_fitting(n_cpus, n_gpus):
            ahead = 0
    return more


def _size(slot: ResourceRequest) -> tuple:
    return slot.whole_gpus, slot.total_cpus, slot.n_workers, slot.strategy, slot.micro_batch_tokens or 0
