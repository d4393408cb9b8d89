"""Forecast what is left of a plan: time from trials that have ended, else from counted operations; disk from what is written.

Nothing is guessed where nothing is known. What a GPU's hour costs would be multiplied with `Time.device_s`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmft.config import TrialSpec
from sweeps.resources.machine import GPU_TYPES, Machine
from sweeps.resources.placement import Placement, place
from sweeps.search import CellState, FailurePolicy, Records, Schedule

if TYPE_CHECKING:
    from llmft.records import Cost
    from sweeps.resources.memory import Memory
    from sweeps.resources.workload import Workload

UTILISATION = 0.3
"""The share of a GPU's peak that its arithmetic is taken to reach, where no trial has ended yet."""

RECORD_BYTES, SET_BYTES, POINT_BYTES = 2048, 2048, 160
"""Of a record: the least, for each set under each checkpoint rule, and for each point of the curve."""

ROW_BYTES, LABEL_BYTES, TOKEN_BYTES, TEXT_BYTES = 6, 4, 2, 48
"""Of a prediction, and of a label's score in it, as compressed; of a token of a generated text, and of the text's scores."""

Stage = Literal["search", "report"]


def n_left(state: CellState, records: Records) -> dict[Stage, int]:
    """Trials of each stage that have not ended, those not known yet included."""
    still_open = {trial.digest for trial in state.open}
    return {
        "search": state.n_search - sum(trial.digest not in still_open for trial in state.search),
        "report": state.n_report - sum(trial.digest not in still_open for trial in state.report),
    }


class _Durations:
    """Mean seconds of trials that have ended, of the trials most like the one in question.

    Those have the same model, task, method, shots and stage; else all but the stage; else the same model, task and method; else the
    same model.
    """

    def __init__(self, records: Records):
        self._seconds: dict[tuple, list[float]] = defaultdict(list)
        for record in records.values():
            if record.finished and record.cost:
                for key in self._keys(record.spec, "search" if record.spec.test_sets == () else "report"):
                    self._seconds[key].append(record.cost.wall_s + record.cost.forgetting_s)

    def like(self, spec: TrialSpec, stage: Stage) -> float | None:
        return next((statistics.fmean(self._seconds[key]) for key in self._keys(spec, stage) if key in self._seconds), None)

    @staticmethod
    def _keys(spec: TrialSpec, stage: Stage) -> list[tuple]:
        whole = (spec.model.name, spec.task, spec.method, spec.n_shots, stage)
        return [whole, whole[:4], whole[:3], whole[:1]]


def remaining_s(states: Iterable[CellState], records: Records, concurrency: int) -> float | None:
    """Estimate of the seconds to the end, at the mean duration of trials alike; None if some cell has none to go by."""
    durations, seconds = _Durations(records), 0.0
    for state in states:
        for stage, n in n_left(state, records).items():
            if n:
                if (duration := durations.like(state.cell.base, stage)) is None:
                    return None
                seconds += n * duration
    return seconds / max(1, concurrency)


@dataclass(frozen=True)
class Time:
    """What is left of a plan: `wall_s` on this machine, `device_s` on one GPU or, without GPUs, one CPU.

    `source` is "records", or "arithmetic" if any cell had no trial to go by.
    """

    wall_s: float
    device_s: float
    on_gpu: bool
    source: Literal["records", "arithmetic"]


def remaining_time(
    states: Iterable[CellState], records: Records, placements: Mapping[str, Placement], machine: Machine, limit: int | None
) -> Time | None:
    """What is left, from trials alike, else from operations on a GPU whose peak is known; None where neither tells.

    Args:
        placements: by the cells' keys (`sweeps.resources.placement.place`).
        limit: trials at a time at the most.
    """
    durations, wall, device, from_records = _Durations(records), 0.0, 0.0, True
    for state in states:
        placement = placements[state.cell.key]
        slot = placement.slot
        n_at_a_time = max(1, min(slot.n_fitting(machine.n_cpus or None, machine.n_gpus), limit or math.inf))
        n_devices = slot.total_gpus or slot.total_cpus
        for stage, n in n_left(state, records).items():
            if not n:
                continue
            duration = durations.like(state.cell.base, stage)
            if duration is None:
                if (seconds := _device_s(state.cell.base, stage, placement, machine)) is None:
                    return None
                duration, from_records = seconds / n_devices, False
            wall += n * duration / n_at_a_time
            device += n * duration * n_devices
    return Time(wall, device, machine.n_gpus > 0, "records" if from_records else "arithmetic")


def _device_s(spec: TrialSpec, stage: Stage, placement: Placement, machine: Machine) -> float | None:
    """Seconds of one GPU at `UTILISATION` of its peak, for one trial; None where the GPU or the trial is not known."""
    node = machine.gpu_node
    if placement.memory is None or placement.work is None or not placement.slot.gpus or node is None or node.gpu_type not in GPU_TYPES:
        return None
    gpu = GPU_TYPES[node.gpu_type]
    peak = 1e12 * (gpu.fp32_tflops if spec.precision == "fp32" else gpu.half_tflops)
    seconds = flops(spec.n_shots, stage, placement.work, placement.memory) / (UTILISATION * peak)
    return None if math.isnan(seconds) else seconds


def flops(n_shots: int, stage: Stage, work: Workload, memory: Memory) -> float:
    """Count the operations of one trial: per weight and token 2 forward, 2 backward and, where it is trained, 2 for its gradient (Kaplan
    et al. 2020), 2 more forward with gradient checkpointing. Attention is left out. NaN where `Workload.tokens_measured` is."""
    forward, backward = 2 * memory.n_parameters, 2 * (memory.n_parameters + memory.n_trainable)
    trained = backward + forward * (2 if work.spec.train.gradient_checkpointing else 1)
    n_inputs = work.n_unlabelled + (len(work.shots) - work.n_unlabelled) * n_shots / max(1, work.spec.n_shots)
    n_trained = work.tokens_trained * n_inputs / max(1, len(work.shots))
    evaluated = work.tokens_evaluated(stage == "report") + (work.tokens_measured if stage == "report" else 0)
    return trained * n_trained + forward * evaluated + 2 * memory.n_teacher_parameters * work.tokens_taught


@dataclass(frozen=True)
class Disk:
    """Bytes that are still to be written: records and predictions, and the trained weights of the report if they are kept."""

    results_bytes: float
    weights_bytes: float


def remaining_disk(states: Iterable[CellState], records: Records, placements: Mapping[str, Placement]) -> Disk:
    """What the trials that are left will write; cells whose size is unknown count with their records alone."""
    results = weights = 0.0
    for state in states:
        left, placement, spec = n_left(state, records), placements[state.cell.key], state.cell.base
        n_points = -(-spec.train.epochs // spec.train.eval_every_epochs) if state.cell.trains else 0
        if (work := placement.work) is not None:
            n_points *= work.n_rounds
            sets = work.tests.sets
            answer = LABEL_BYTES * work.n_words or TEXT_BYTES + TOKEN_BYTES * work.tests.n_new_tokens
            predictions = len(sets) * SET_BYTES + sum(prompts.n for prompts in sets) * (ROW_BYTES + answer)
            results += left["report"] * len(spec.selections) * predictions
        results += sum(left.values()) * (RECORD_BYTES + n_points * POINT_BYTES)
        if (memory := placement.memory) is not None:
            weights += left["report"] * 4 * memory.n_trainable
    return Disk(results, weights)


@dataclass(frozen=True)
class Need:
    """What the trials of one model, task and method entry get. `shots` are those of its cells."""

    model: str
    task: str
    method: str
    shots: tuple[int, ...]
    placement: Placement

    def as_json(self) -> dict[str, Any]:
        """The need as plain data."""
        placement, memory = self.placement, self.placement.memory
        totals: dict[str, int] = {}
        if memory:
            on_gpu = placement.slot.gpus > 0
            totals = {"device_bytes": memory.device_bytes * on_gpu, "host_bytes": memory.host_bytes if on_gpu else memory.cpu_bytes}
        return {
            "model": self.model, "task": self.task, "method": self.method, "shots": self.shots,
            "slot": dataclasses.asdict(placement.slot), "memory": dataclasses.asdict(memory) | totals if memory else None,
            "same_shots": placement.work is not None and placement.work.same_shots,
            "unknown": placement.unknown, "problem": placement.problem,
        }  # fmt: skip


@dataclass(frozen=True)
class Leftover:
    """Records in the folder that the plan does not name: of other plans, and of an older llmft under another digest."""

    n_other: int
    n_outdated: int


@dataclass(frozen=True)
class PlanPreview:
    """`n_again` failed trials would be tried again; `time` is None where nothing is known to tell it by."""

    machine: Machine
    states: list[CellState]
    needs: list[Need]
    n_again: int
    leftover: Leftover
    time: Time | None
    disk: Disk

    def as_json(self) -> dict[str, Any]:
        """The preview as plain data; sizes in bytes, times in seconds."""
        plain = {name: dataclasses.asdict(value) for name in ("machine", "leftover", "time", "disk") if (value := getattr(self, name))}
        return {"time": None, **plain, "n_again": self.n_again, "needs": [need.as_json() for need in self.needs]}


def measured_costs(states: Iterable[CellState], records: Records) -> dict[str, list[Cost]]:
    """What the trials that have finished took, by their cells' keys."""
    costs: dict[str, list[Cost]] = {}
    for state in states:
        ended = [records[trial.digest] for trial in (*state.search, *state.report) if trial.digest in records]
        costs[state.cell.key] = [record.cost for record in ended if record.finished and record.cost]
    return costs


def preview_plan(
    schedule: Schedule, records: Records, machine: Machine, gpus_per_trial: float | None = None, limit: int | None = None
) -> PlanPreview:
    """Preview a plan whose `records` lie in the folder of results.

    Args:
        gpus_per_trial, limit: as for `sweeps.resources.placement.place`.

    Raises:
        UserError: as `sweeps.resources.placement.place`.
    """
    states = schedule.states(records)
    placements = place([state.cell for state in states], machine, gpus_per_trial, limit, measured_costs(states, records))
    known, policy = {trial.digest for trial in schedule.known(records)}, FailurePolicy()
    others = [record for digest, record in records.items() if digest not in known]
    n_outdated = sum(record.digest != record.spec.digest for record in others)
    return PlanPreview(
        machine=machine,
        states=states,
        needs=_needs(states, placements),
        n_again=sum(not policy.settled(records[digest]) for digest in known if digest in records),
        leftover=Leftover(len(others) - n_outdated, n_outdated),
        time=remaining_time(states, records, placements, machine, limit),
        disk=remaining_disk(states, records, placements),
    )


def _needs(states: Iterable[CellState], placements: dict[str, Placement]) -> list[Need]:
    rows: dict[tuple, Need] = {}
    for state in states:
        spec = state.cell.base
        key = spec.model, spec.task, state.cell.entry
        shots = (*rows[key].shots, spec.n_shots) if key in rows else (spec.n_shots,)
        rows[key] = Need(spec.model.name, spec.task, state.cell.entry, shots, placements[state.cell.key])
    return list(rows.values())
