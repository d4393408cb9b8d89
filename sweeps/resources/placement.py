"""Decide what each trial gets: processes, CPUs and GPUs, as the plan or the command line says, or as the memory that it needs asks for.

Nothing here changes what a trial answers, so nothing of it is in a trial's digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmft.errors import TrialFailure, UserError
from sweeps.planning import Cell
from sweeps.resources.machine import GIB, Machine
from sweeps.resources.memory import Memory, estimate_memory
from sweeps.resources.slots import ResourceRequest

if TYPE_CHECKING:
    from llmft.records import Cost
    from sweeps.planning import ModelEntry
    from sweeps.resources.network_sizes import NetworkSizes
    from sweeps.resources.workload import Workload

SHARES = (8, 5, 4, 3, 2, 1)
"""Trials that may share a GPU, most first."""

GPU_HEADROOM, CPU_HEADROOM = 1.2, 1.35
"""What an estimate is multiplied by before it counts as fitting: the allocator's rounding and fragments (glibc's are larger)."""

CUDA_CONTEXT_BYTES, PROCESS_BYTES = GIB // 2, 3 * GIB // 2
"""What a process holds besides tensors: on a GPU the context, kernels and workspaces; in the host's memory interpreter and libraries."""

SMALLER_PASSES = (4096, 1024)
"""Tokens in a forward pass where the usual number needs too much memory; it changes no answer."""

MOST_GPUS = 16
"""Where nodes may still join, no trial is given more."""


@dataclass(frozen=True)
class Placement:
    """What each trial of a cell gets, and why.

    Attributes:
        memory: what a trial needs in that slot, None where `unknown` says why it cannot be told.
        work: what was estimated from.
        problem: what does not fit and how to mend it, in one line; "" where all is well.
    """

    slot: ResourceRequest
    memory: Memory | None = None
    work: Workload | None = None
    unknown: str = ""
    problem: str = ""


def place(
    cells: Iterable[Cell],
    machine: Machine,
    gpus_per_trial: float | None = None,
    limit: int | None = None,
    costs: Mapping[str, Sequence[Cost]] | None = None,
) -> dict[str, Placement]:
    """Place every cell; gives placements by the cells' keys. Cells that differ in their shots alone get the same.

    Where neither `gpus_per_trial` nor the plan says what a model gets, it is the smallest share of a GPU that holds the estimated
    memory with head-room, or as many GPUs, sharded, as it takes; without GPUs, the CPUs are shared by as many trials as the
    memory holds.

    Args:
        gpus_per_trial: for every cell: a share of one GPU, or a number of them.
        limit: trials at a time at the most.
        costs: of trials that have ended, by the cells' keys; a peak that is higher than the estimate replaces it.

    Raises:
        UserError: more GPUs are asked for than the machine has or will ever have, or a method and a model do not go together.
    """
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.base.model, cell.base.task, cell.entry), []).append(cell)
    placements: dict[str, Placement] = {}
    for group in groups.values():
        ended = [cost for cell in group for cost in (costs or {}).get(cell.key, ())]
        placement = _place(group[0].model_entry, _Estimates(group, ended), machine, gpus_per_trial, limit)
        placements |= dict.fromkeys((cell.key for cell in group), placement)
    return placements


def check_gpus(cells: Iterable[Cell], machine: Machine, gpus_per_trial: float | None = None) -> None:
    """Check that the machine has the GPUs that are asked for; `place` does too, but only after it has estimated the memory.

    Raises:
        UserError: it has not.
    """
    for entry in {cell.model_entry.name: cell.model_entry for cell in cells}.values():
        _requested(entry, machine, gpus_per_trial)


class _Estimates:
    """What trials of cells that differ in their shots alone need, by slot; `work` is None where `unknown` says why that is not known.

    Raises:
        UserError: the method and the model do not go together, so that every trial would fail.
    """

    def __init__(self, cells: list[Cell], ended: Sequence[Cost] = ()):
        from sweeps.resources.network_sizes import count_networks
        from sweeps.resources.workload import largest_workload

        self.ended, self.unknown = ended, ""
        self.work: Workload | None = None
        self.networks: tuple[NetworkSizes, NetworkSizes | None]
        try:
            work = largest_workload(cells)
        except (UserError, TrialFailure) as error:  # of a draw, say, which is not that of every seed
            self.unknown = str(error)
            return
        try:
            self.work, self.networks = work, count_networks(work)
        except UserError as error:
            raise UserError(f"methods.{cells[0].entry}: {error}") from None
        except Exception as error:  # a model's own code may have other names, or ask for numbers, which there are none of
            self.work, self.unknown = (
                None,
                f"the network of this model or method cannot be counted without its weights ({type(error).__name__})",
            )

    def memory(self, slot: ResourceRequest) -> Memory | None:
        """What a process of a trial needs in this slot, at least what one has taken; None: unknown."""
        if self.work is None:
            return None
        memory = estimate_memory(
            self.work, self.networks, on_gpu=slot.gpus > 0, n_workers=slot.n_workers, strategy=slot.strategy,
            micro_batch_tokens=slot.micro_batch_tokens,
        )  # fmt: skip
        kind = "cuda" if slot.gpus else "cpu"
        peaks = [cost.peak_memory_bytes for cost in self.ended if cost.device.startswith(kind) and cost.n_workers == slot.n_workers]
        return replace(memory, measured_bytes=0 if slot.micro_batch_tokens else max(peaks, default=0))


def _place(entry: ModelEntry, estimates: _Estimates, machine: Machine, gpus_per_trial: float | None, limit: int | None) -> Placement:
    n_workers, gpus = _requested(entry, machine, gpus_per_trial)
    on_gpu = gpus != 0 and (machine.n_gpus > 0 or (machine.elastic and gpus is not None))
    n = n_workers or (max(1, round(gpus)) if on_gpu and gpus else 1)
    each = 0.0 if not on_gpu else gpus if gpus and n == 1 else 1.0
    if on_gpu and n_workers is None and gpus is None:
        slot, memory = _default(estimates, machine)
    else:
        slot, memory = _with_fitting_passes(
            ResourceRequest(n, gpus=each, strategy="none" if n == 1 else entry.parallel or "ddp"), estimates, machine
        )
        if on_gpu and n > 1 and entry.parallel is None and not (memory and _fits(slot, memory, machine)):
            slot, memory = _with_fitting_passes(ResourceRequest(n, gpus=each, strategy="fsdp"), estimates, machine)
    slot = _with_cpus(slot, memory, machine, limit)
    if memory is None:
        return Placement(slot, unknown=estimates.unknown)
    return Placement(slot, memory, estimates.work, problem=_problem(slot, memory, machine, limit))


def _requested(entry: ModelEntry, machine: Machine, gpus_per_trial: float | None) -> tuple[int | None, float | None]:
    """The processes and GPUs that are asked for, None where nothing is said.

    More GPUs than the machine has are refused; a machine without any may still try the plan on its CPUs.
    """
    n_workers, gpus = (entry.workers, entry.gpus) if gpus_per_trial is None else (None, gpus_per_trial)
    if gpus_per_trial is not None and gpus_per_trial > 1 and gpus_per_trial % 1:
        raise UserError(f"--gpus-per-trial: a share of one GPU, or a whole number of them (got {gpus_per_trial:g}).")
    wanted = gpus if gpus is not None else n_workers if machine.n_gpus else None
    if machine.elastic or not wanted or wanted <= machine.n_gpus or (gpus_per_trial is None and not machine.n_gpus):
        return n_workers, gpus
    where, fix = (
        ("--gpus-per-trial", "Ask for fewer")
        if gpus_per_trial is not None
        else (f"models: {entry.name}: {'workers' if gpus is None else 'gpus'}", "Lower it, set gpus to 0 for CPUs alone")
    )
    raise UserError(f"{where}: {wanted:g} asked for, but this machine has {machine.n_gpus} GPUs. {fix}, or use a cluster (--address).")


def device_need(memory: Memory) -> float:
    """Bytes of a GPU that a process counts as needing: its tensors with head-room, and what every process holds."""
    return GPU_HEADROOM * memory.device_bytes + CUDA_CONTEXT_BYTES


def cpu_need(memory: Memory) -> float:
    """Bytes of the host's memory that a process counts as needing where it computes on CPUs."""
    return CPU_HEADROOM * memory.cpu_bytes + PROCESS_BYTES


def _available(slot: ResourceRequest, machine: Machine) -> float:
    """Bytes that one of a slot's processes may fill: of its GPU, else of the host's memory; infinite where unknown."""
    if slot.gpus:
        node = machine.gpu_node
        return node.gpu_bytes * min(1.0, slot.gpus) if node and node.gpu_bytes else math.inf
    return min((node.host_bytes / slot.n_workers for node in machine.nodes if node.host_bytes), default=math.inf)


def _fits(slot: ResourceRequest, memory: Memory, machine: Machine) -> bool:
    return (device_need(memory) if slot.gpus else cpu_need(memory)) <= _available(slot, machine)


def _with_fitting_passes(slot: ResourceRequest, estimates: _Estimates, machine: Machine) -> tuple[ResourceRequest, Memory | None]:
    """The slot with the largest forward passes that fit, and what they need; the last that were tried where none does."""
    memory = estimates.memory(slot)
    for tokens in SMALLER_PASSES:
        if memory is None or _fits(slot, memory, machine) or memory.held_bytes > _available(slot, machine):
            break
        slot = replace(slot, micro_batch_tokens=tokens)
        memory = estimates.memory(slot)
    return slot, memory


def _default(estimates: _Estimates, machine: Machine) -> tuple[ResourceRequest, Memory | None]:
    """The smallest share of a GPU that holds a trial, or the fewest GPUs that do together; one where that cannot be told."""
    memory, node = estimates.memory(ResourceRequest(gpus=1.0)), machine.gpu_node
    if memory is None or node is None or not node.gpu_bytes:
        return ResourceRequest(gpus=1.0), memory
    for n_trials in SHARES:
        slot = ResourceRequest(gpus=math.floor(10_000 / n_trials) / 10_000)  # Ray counts in ten-thousandths, and all shares must fit
        n_processes = n_trials * node.n_gpus
        host_fits = not node.host_bytes or n_processes * (memory.host_bytes + PROCESS_BYTES) <= node.host_bytes
        cpus_suffice = not node.n_cpus or n_processes <= node.n_cpus
        if _fits(slot, memory, machine) and (n_trials == 1 or (host_fits and cpus_suffice)):
            return slot, memory
    most, n = MOST_GPUS if machine.elastic else machine.n_gpus, 1
    while True:
        slot, memory = _with_fitting_passes(ResourceRequest(n, gpus=1.0, strategy="none" if n == 1 else "fsdp"), estimates, machine)
        if memory is None or _fits(slot, memory, machine) or 2 * n > most:
            return slot, memory
        n *= 2


def _with_cpus(slot: ResourceRequest, memory: Memory | None, machine: Machine, limit: int | None) -> ResourceRequest:
    """The slot with its part of the CPUs; on a cluster one for each process, since nodes differ and may still join."""
    (node, *others) = machine.nodes
    if others or machine.elastic:
        return slot
    n_trials = slot.n_fitting(None, machine.n_gpus) if slot.gpus else node.n_cpus // slot.n_workers
    n_trials = max(1, min(n_trials, limit or n_trials))
    cpus = node.n_cpus // (n_trials * slot.n_workers)
    if memory and node.host_bytes and not slot.gpus:  # so many CPUs that no more trials start than the memory holds
        n_held = max(1, int(node.host_bytes / (slot.n_workers * cpu_need(memory))))
        cpus = max(cpus, math.ceil(node.n_cpus / (n_held * slot.n_workers)))
    return replace(slot, cpus=max(1, min(cpus, node.n_cpus // slot.n_workers)))


def _problem(slot: ResourceRequest, memory: Memory, machine: Machine, limit: int | None) -> str:
    """What of a trial, or of as many as would run at a time, does not fit."""
    if memory.n_trainable and memory.training_bytes > memory.held_bytes:
        fix = "Set train.gradient_checkpointing to true, or a smaller train.batch_size"
    else:
        fix = "Use more GPUs (models: gpus, parallel: fsdp)" if slot.gpus else "Use a machine with more memory"
        fix += ", a smaller model" + (", or a method that trains fewer weights" if memory.n_trainable else "")
    need, available = device_need(memory) if slot.gpus else cpu_need(memory), _available(slot, machine)
    if need > available:
        where = ("each GPU" if slot.gpus >= 1 else "its share of a GPU") if slot.gpus else "the host's memory"
        return f"a process needs {need / GIB:.1f} GiB, and {where} has {available / GIB:.1f}. {fix}."
    if slot.gpus:
        node, need = machine.gpu_node, memory.host_bytes + PROCESS_BYTES
        n_trials = slot.n_fitting(None, node.n_gpus) if node else 1
    else:
        node = min(machine.nodes, key=lambda node: node.host_bytes or math.inf)
        n_trials = slot.n_fitting(node.n_cpus, 0)
    n_trials, need = max(1, min(n_trials, limit or n_trials)), need * slot.n_workers
    if node and node.host_bytes and n_trials * need > node.host_bytes:
        fewer = max(1, int(node.host_bytes / need))
        return (
            f"{n_trials} at a time need {n_trials * need / GIB:.1f} GiB of the host's memory, and there are "
            f"{node.host_bytes / GIB:.1f}. " + (f"Use --workers {fewer}." if fewer < n_trials else fix + ".")
        )
    return ""
