"""What `llmft plan` says before anything starts: which trials there are, what each gets, and what they will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sweeps.cell_plan import CellState, Records
from sweeps.devices import Machine
from sweeps.estimate import Disk, Time, remaining_disk, remaining_time
from sweeps.failures import FailurePolicy
from sweeps.resources import Placement, place
from sweeps.schedule import Schedule


@dataclass(frozen=True)
class Need:
    """What the trials of one model, task and method entry get. `shots` are those of its cells."""

    model: str
    task: str
    method: str
    shots: tuple[int, ...]
    placement: Placement


@dataclass(frozen=True)
class Leftover:
    """Records in the folder that the plan does not name: of other plans, and of an older llmft under another digest."""

    n_other: int
    n_outdated: int


@dataclass(frozen=True)
class Outlook:
    """`n_again` failed trials would be tried again; `time` is None where nothing is known to tell it by."""

    machine: Machine
    states: list[CellState]
    needs: list[Need]
    n_again: int
    leftover: Leftover
    time: Time | None
    disk: Disk

    def as_json(self) -> dict[str, Any]:
        """The outlook as plain data; sizes in bytes, times in seconds."""
        needs = [
            {
                "model": need.model, "task": need.task, "method": need.method, "shots": need.shots,
                "slot": dataclasses.asdict(need.placement.slot),
                "memory": dataclasses.asdict(memory) | _totals(need.placement) if (memory := need.placement.memory) else None,
                "same_shots": need.placement.work is not None and need.placement.work.same_shots,
                "unknown": need.placement.unknown, "problem": need.placement.problem,
            }
            for need in self.needs
        ]  # fmt: skip
        return {
            "machine": dataclasses.asdict(self.machine),
            "needs": needs,
            "n_again": self.n_again,
            "leftover": dataclasses.asdict(self.leftover),
            "time": dataclasses.asdict(self.time) if self.time else None,
            "disk": dataclasses.asdict(self.disk),
        }


def _totals(placement: Placement) -> dict[str, int]:
    memory = placement.memory
    if placement.slot.gpus:
        return {"device_bytes": memory.device_bytes, "host_bytes": memory.host_bytes}
    return {"device_bytes": 0, "host_bytes": memory.cpu_bytes}


def look_ahead(
    schedule: Schedule, records: Records, machine: Machine, gpus_per_trial: float | None = None, limit: int | None = None
) -> Outlook:
    """The outlook of a plan whose `records` lie in the folder of results.

    Args:
        gpus_per_trial, limit: as for `sweeps.resources.place`.

    Raises:
        UserError: as `sweeps.resources.place`.
    """
    states = schedule.states(records)
    placements = place([state.cell for state in states], machine, gpus_per_trial, limit)
    known, policy = {trial.digest for trial in schedule.known(records)}, FailurePolicy()
    others = [record for digest, record in records.items() if digest not in known]
    n_outdated = sum(record.digest != record.spec.digest for record in others)
    return Outlook(
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
