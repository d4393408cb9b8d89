"""A plan before it runs: its cells, trials by stage, memory of each kind of trial, time and disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sweeps.display.catalogue import terminal_table
from sweeps.display.live_table import duration
from sweeps.search import CellState, PlannedTrial, Records, failed

if TYPE_CHECKING:
    from sweeps.resources import Memory, Placement, PlanPreview

PLAN_COLUMNS = ("model", "task", "method", "shots", "pattern", "searched", "search", "report", "done", "failed", "new")
NEED_COLUMNS = ("model", "task", "method", "gets", "memory", "weights", "gradients", "optimiser", "activations", "host")


def preview_page(preview: PlanPreview, records: Records) -> Group:
    """Return everything that is known of a plan before it runs.

    Args:
        preview: from `sweeps.resources.preview_plan`.
        records: by digest, the results that exist already.
    """
    lines = []
    for stage, (n_new, n_done, n_failed) in count_by_stage(preview.states, records).items():
        lines.append(f"{stage}: {n_new + n_done + n_failed} trials, {n_new} new, {n_done} done, {n_failed} failed")
    if preview.n_again:
        lines.append(f"{preview.n_again} of the failed would be tried again")
    n_other, n_outdated = preview.leftover.n_other, preview.leftover.n_outdated
    if n_other or n_outdated:
        lines.append(f"also there, and not counted: {n_other} records of other plans, {n_outdated} of an older llmft")
    machine = Text(f"on {preview.machine}", style="bold")
    return Group(
        plan_table(preview.states), *map(Text, lines), machine, _needs_table(preview), *_notes(preview), *map(Text, _assumptions(preview))
    )


def plan_table(states: Iterable[CellState]) -> Table:
    """Return one row for each cell: its trials by stage, new, done and failed."""
    rows = []
    for state in states:
        base, report = state.cell.base, "search failed" if state.failed else str(state.n_report)
        rows.append((
            base.model.name, base.task, state.cell.entry, str(base.n_shots), base.pattern, ", ".join(state.cell.ranges) or "-",
            str(state.n_search), report, str(state.n_done - state.n_failed), str(state.n_failed), str(state.total - state.n_done),
        ))  # fmt: skip
    return terminal_table(PLAN_COLUMNS, rows, n_left=3)


def count_by_stage(states: Iterable[CellState], records: Records) -> dict[str, tuple[int, int, int]]:
    """Return stage -> (new, done, failed) trials."""
    totals, states = {}, list(states)
    open_digests = {trial.digest for state in states for trial in state.open}
    for stage, expected in (("search", sum(s.n_search for s in states)), ("report", sum(s.n_report for s in states))):
        trials: list[PlannedTrial] = [trial for state in states for trial in getattr(state, stage)]
        ended = [records[trial.digest] for trial in trials if trial.digest not in open_digests]
        n_failed = sum(map(failed, ended))
        totals[stage] = expected - len(ended), len(ended) - n_failed, n_failed
    return totals


def _needs_table(preview: PlanPreview) -> Table:
    """Return what a trial of each model, task and method gets and needs, for each of its processes."""
    rows = []
    for need in preview.needs:
        sizes = _sizes(need.placement, need.placement.memory) if need.placement.memory else ["?"]
        rows.append((need.model, need.task, need.method, str(need.placement.slot), *sizes))
    return terminal_table(NEED_COLUMNS, rows, n_left=4)


def _sizes(placement: Placement, memory: Memory) -> list[str]:
    """Return the total on what limits the process (its GPU, else the host), its parts, and the host's memory where there is a GPU."""
    in_training = bool(memory.n_trainable) and not _scoring_is_worst(memory)
    parts = [
        memory.weight_bytes + memory.gathered_bytes, memory.gradient_bytes if in_training else 0, memory.optimizer_bytes,
        memory.training_bytes if in_training else memory.scoring_bytes,
    ]  # fmt: skip
    total, host = memory.device_bytes, memory.host_bytes
    if not placement.slot.gpus:
        total, host = memory.cpu_bytes, memory.cpu_bytes - sum(parts)
    return [size_text(size) if size else "-" for size in (total, *parts, host)]


def _scoring_is_worst(memory: Memory) -> bool:
    return memory.scoring_bytes > memory.gradient_bytes + memory.training_bytes


def _notes(preview: PlanPreview) -> list[Text]:
    """Return what is unknown, what does not fit, and where all seeds draw the same examples."""
    notes = []
    for need in preview.needs:
        placement, name = need.placement, f"{need.model} {need.task} {need.method}"
        if placement.unknown:
            notes.append(Text(f"memory unknown: {name}: {placement.unknown}", style="dim"))
        if placement.work is not None and placement.work.same_shots:
            text = f"every seed draws the same examples: {name}: {max(need.shots)} shots are all that the training pool holds"
            text += ", so that the spread over seeds leaves their choice out. Use fewer, or a larger pool."
            notes.append(Text(text, style="yellow"))
        if placement.problem:
            notes.append(Text(f"does not fit: {name}: {placement.problem}", style="yellow"))
    return notes


def _assumptions(preview: PlanPreview) -> list[str]:
    """Return how memory, time and disk were estimated."""
    from sweeps.resources import CPU_HEADROOM, CUDA_CONTEXT_BYTES, GIB, GPU_HEADROOM, PROCESS_BYTES

    memories = [need.placement.memory for need in preview.needs if need.placement.memory]
    held = "the base model, the best weights on dev and what a teacher has said"
    if not any(memory.taught_bytes for memory in memories):
        held = "the base model and the best weights on dev"
    lines = [f'memory: of each process, with the longest batch of the longest draw; "host" holds {held}']
    if any(memory.n_trainable and _scoring_is_worst(memory) for memory in memories):
        lines.append('gradients: "-" where scoring takes the most memory; those of training are not there then')
    headroom = f"{CPU_HEADROOM - 1:.0%} head-room"
    if any(need.placement.slot.gpus for need in preview.needs):
        headroom = f"{GPU_HEADROOM - 1:.0%} head-room and {CUDA_CONTEXT_BYTES / GIB:g} GiB for the GPU's context"
    lines.append(
        f"assumed on top: {headroom}, and {PROCESS_BYTES / GIB:g} GiB of the host's memory for the process; nothing else runs here"
    )
    disk = preview.disk
    kept = f"; {size_text(disk.weights_bytes)} more if trained weights are kept" if disk.weights_bytes else ""
    return [*lines, _time_text(preview), f"disk: about {size_text(disk.results_bytes)} of records and predictions{kept}"]


def _time_text(preview: PlanPreview) -> str:
    from sweeps.resources import GPU_TYPES, UTILISATION

    time, node, source = preview.time, preview.machine.gpu_node, "from trials that have ended"
    if time is None:
        return "time: unknown until the first trials end"
    if time.source == "arithmetic" and node is not None and node.gpu_type:
        gpu = GPU_TYPES[node.gpu_type]
        source = (
            f"assuming {UTILISATION:.0%} of the peak of {node.gpu_type}, {gpu.fp32_tflops:g} TFLOP/s in fp32, {gpu.half_tflops:g} in half"
        )
    return f"time: about {duration(time.wall_s)} ({time.device_s / 3600:.3g} {'GPU' if time.on_gpu else 'CPU'}-hours), {source}"


def size_text(n_bytes: float) -> str:
    """Write a size as 512 B, 34 MiB or 1.2 GiB."""
    size, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"
