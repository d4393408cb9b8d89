"""The machine or cluster that a sweep runs on, as far as it matters for what a trial gets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

GIB = 2**30
ACCELERATOR_PREFIX = "accelerator_type:"  # of the resource by which a Ray node names its GPU
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class GpuType:
    """Usable memory in GiB, and the vendor's peak of dense arithmetic in TFLOP/s: fp32 without TF32, and half precision."""

    memory_gib: float
    fp32_tflops: float
    half_tflops: float


GPU_TYPES: Mapping[str, GpuType] = {  # as Ray names them; the smaller one where a name stands for two sizes
    "T4": GpuType(14.5, 8.1, 65),
    "P100": GpuType(15.8, 9.3, 18.7),
    "V100": GpuType(15.7, 15.7, 125),
    "A10": GpuType(22, 31.2, 125),
    "A10G": GpuType(22, 31.2, 70),
    "L4": GpuType(22, 30.3, 121),
    "L40S": GpuType(44.4, 91.6, 362),
    "A100": GpuType(39.4, 19.5, 312),
    "A100-40G": GpuType(39.4, 19.5, 312),
    "A100-80G": GpuType(79.1, 19.5, 312),
    "H100": GpuType(79.1, 66.9, 989),
    "H200": GpuType(139.8, 66.9, 989),
    "B200": GpuType(178, 75, 2250),
}


@dataclass(frozen=True)
class Node:
    """One computer. `host_bytes` and `gpu_bytes` (of each of its GPUs) are None where unknown, `gpu_type` is then ""."""

    n_cpus: int
    n_gpus: int = 0
    host_bytes: int | None = None
    gpu_bytes: int | None = None
    gpu_type: str = ""


@dataclass(frozen=True)
class Machine:
    """All nodes. `elastic`: others may still join, as under an autoscaler."""

    nodes: tuple[Node, ...]
    elastic: bool = False

    @property
    def n_cpus(self) -> int:
        return sum(node.n_cpus for node in self.nodes)

    @property
    def n_gpus(self) -> int:
        return sum(node.n_gpus for node in self.nodes)

    @cached_property
    def gpu_node(self) -> Node | None:
        """The node whose GPUs have the least memory, for a trial may land on it; None without GPUs."""
        return min((node for node in self.nodes if node.n_gpus), key=lambda node: node.gpu_bytes or 0, default=None)

    def __str__(self) -> str:
        if (node := self.gpu_node) is None:
            host = min((node.host_bytes for node in self.nodes if node.host_bytes), default=None)
            return f"{self.n_cpus} CPUs" + (f", {host / GIB:.3g} GiB of memory" if host else "") + ", no GPU"
        memory = f" with {node.gpu_bytes / GIB:.3g} GiB" if node.gpu_bytes else ", memory unknown"
        cpus = f", {self.n_cpus} CPUs" if self.n_cpus else ""
        return f"{self.n_gpus} {node.gpu_type or 'GPU'}{memory}{cpus}" + (", more may join" if self.elastic else "")


def local_machine(device_memory_gib: float | None = None) -> Machine:
    """This computer, as this process may use it.

    Args:
        device_memory_gib: stands in for the memory of each GPU. Where there is no GPU, the answer is about a computer elsewhere,
            with GPUs of that size and as many as it takes.
    """
    import torch

    node = Node(usable_cpus(), host_bytes=host_memory_bytes())
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        return Machine((node,)) if device_memory_gib is None else Machine((_with_gpus(Node(0), 1, "", device_memory_gib),), True)
    # the properties, not `mem_get_info`: that would make a context on every GPU, which holds memory until this process ends
    properties = min((torch.cuda.get_device_properties(i) for i in range(n_gpus)), key=lambda found: found.total_memory)
    memory_gib = device_memory_gib or properties.total_memory / GIB
    return Machine((_with_gpus(node, n_gpus, properties.name, memory_gib),))


def cluster_machine(nodes: Iterable[Mapping[str, float]], device_memory_gib: float | None = None, elastic: bool = True) -> Machine:
    """A cluster, from the resources that Ray gives for each node (or node type, for those that may still join).

    Args:
        nodes: such as {"CPU": 8.0, "GPU": 1.0, "memory": 2e10, "accelerator_type:A10G": 1.0}.
        device_memory_gib: stands in for the memory of each GPU, e.g. where its type is not in `GPU_TYPES`.
    """
    return Machine(tuple(_ray_node(resources, device_memory_gib) for resources in nodes), elastic)


def _ray_node(resources: Mapping[str, float], device_memory_gib: float | None) -> Node:
    memory = resources.get("memory")
    node = Node(int(resources.get("CPU", 0)), host_bytes=int(memory) if memory else None)
    named = (key.removeprefix(ACCELERATOR_PREFIX) for key in resources if key.startswith(ACCELERATOR_PREFIX))
    n_gpus, name = int(resources.get("GPU", 0)), next(named, "")
    return _with_gpus(node, n_gpus, name, device_memory_gib) if n_gpus else node


def _with_gpus(node: Node, n_gpus: int, name: str, memory_gib: float | None) -> Node:
    gpu_type = find_gpu_type(name)
    if memory_gib is None and gpu_type:
        memory_gib = GPU_TYPES[gpu_type].memory_gib
    memory = None if memory_gib is None else int(memory_gib * GIB)
    return Node(node.n_cpus, n_gpus, node.host_bytes, memory, gpu_type or name)


def find_gpu_type(name: str) -> str | None:
    """The key of `GPU_TYPES` that a name of Ray's or of the driver's means: "NVIDIA A100-SXM4-40GB" -> "A100"."""
    words = [name, *re.split(r"[\s-]+", name)]
    return next((word for word in words if word in GPU_TYPES), None)


def usable_cpus() -> int:
    """CPUs that this process may use: those it is bound to, at most as many as the container's quota of time."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*_cgroup("cpu.max"), *_cgroup("cpu/cpu.cfs_quota_us"), *_cgroup("cpu/cpu.cfs_period_us"), "", ""][:2]
    return max(1, min(n_cpus, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else n_cpus


def host_memory_bytes() -> int:
    """Bytes of memory that this process may use: the computer's, at most the container's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = [*_cgroup("memory.max"), *_cgroup("memory/memory.limit_in_bytes"), ""][0]
    return min(physical, int(limit)) if limit.isdigit() else physical


def _cgroup(name: str) -> list[str]:
    """The words of a control group's file, as a container sees its own (version 2, or 1 where the name has a folder)."""
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []
