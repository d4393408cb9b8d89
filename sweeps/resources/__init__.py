"""What a trial gets on this machine: devices, memory, placement, and a forecast of time and disk."""

from sweeps.resources.forecast import UTILISATION, PlanPreview, measured_costs, preview_plan, remaining_s
from sweeps.resources.machine import GIB, GPU_TYPES, Machine, cluster_machine, local_machine, usable_cpus
from sweeps.resources.memory import Memory
from sweeps.resources.placement import CPU_HEADROOM, CUDA_CONTEXT_BYTES, GPU_HEADROOM, PROCESS_BYTES, Placement, check_gpus, place
from sweeps.resources.slots import ResourceRequest, trials_to_start

__all__ = [
    "CPU_HEADROOM", "CUDA_CONTEXT_BYTES", "GIB", "GPU_HEADROOM", "GPU_TYPES", "Machine", "Memory", "PROCESS_BYTES", "Placement",
    "PlanPreview", "ResourceRequest", "UTILISATION", "check_gpus", "cluster_machine", "local_machine", "measured_costs", "place",
    "preview_plan", "remaining_s", "trials_to_start", "usable_cpus",
]  # fmt: skip
