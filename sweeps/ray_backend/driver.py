"""A sweep's trials on Ray: places and workers are Ray's, every decision is the schedule's, every result the store's."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sweeps.ray_backend.session import muted, ray_session, watched_head  # isort: skip - before Ray, which reads the environment that it sets
import ray
from ray import tune

from sweeps.execution import SweepState, fetch_on_every_node
from sweeps.planning import Cell
from sweeps.ray_backend.local_head import OwnRay
from sweeps.ray_backend.scratch import scratch_folder
from sweeps.ray_backend.searcher import ScheduleSearcher, SweepCallback
from sweeps.ray_backend.worker import TrialTrainable, read_job, slot_in
from sweeps.resources import Machine, ResourceRequest, cluster_machine, local_machine, place, trials_to_start
from sweeps.search import PlannedTrial

LOOK_EVERY_S = 2.0
AHEAD = 4
"""Trials that wait for nodes to come, on a cluster: about so many are asked of an autoscaler at a time."""

HEAD = {"node:__internal_head__": 0.001}
"""Where the process waits that a group of workers reports to: the head is always there, and needs no CPU for it."""


def run_on_ray(
    ledger: SweepState,
    *,
    address: str | None,
    workers: int | None,
    gpus_per_trial: float | None,
    run_trial: Callable[..., Any] | None,
    own_ray: OwnRay,
    verbose: bool,
) -> None:
    """Run the ledger's trials; the arguments are those of `sweeps.run.run_sweep`."""
    root, cells = ledger.store.root, ledger.schedule.cells
    slots: dict[str, ResourceRequest] = {}
    if not address:  # mistakes show before Ray starts
        slots = _slots(ledger, local_machine(ledger.plan.device_memory), gpus_per_trial, workers)
    ledger.progress.status("starting Ray ...")
    if not (address or ray.is_initialized()):
        own_ray.start(
            max([workers or 1, *(slot.total_cpus for slot in slots.values())]),
            groups=any(slot.n_workers > 1 for slot in slots.values()),
        )
    with (
        muted(verbose),
        scratch_folder(root.absolute() if address and isinstance(root, Path) else None) as scratch,
        ray_session(address, verbose, own_ray),
    ):
        if address:
            fetch_on_every_node(cells, ledger.progress.say)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            slots = _slots(ledger, cluster_machine(nodes, ledger.plan.device_memory), gpus_per_trial, workers)
        common = {"root": str(root.absolute()), "scratch": str(scratch)}

        def slot_of(trial: PlannedTrial) -> ResourceRequest:
            return slots[trial.cell.key]

        def job_of(trial: PlannedTrial) -> dict[str, Any]:
            slot = slot_of(trial)
            job = {
                **common,
                "digest": trial.digest,
                "spec": trial.spec.model_dump_json(),
                "slot": asdict(slot),
                "strategy": slot.strategy,
                "n_threads": slot.cpus,
                "micro_batch_tokens": slot.micro_batch_tokens,
                **ledger.runtime_settings(trial),
            }
            # one text: Tune copies, flattens and writes down every key of a configuration, several times a trial
            return {"job": json.dumps(job)} | ({"run_trial": run_trial} if run_trial else {})

        searcher = ScheduleSearcher(ledger, job_of, slot_of, CapacityPlanner(ledger, slots, workers, elastic=bool(address)))
        kinds = set(slots.values())
        bundle = _bundle(kinds.pop()) if len(kinds) == 1 else lambda config: _bundle(slot_in(read_job(config)))
        tuner = tune.Tuner(
            tune.with_resources(TrialTrainable, bundle),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),  # fmt: skip
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[SweepCallback(searcher)],
                failure_config=tune.FailureConfig(max_failures=-1),  # the searcher counts
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            with watched_head(ledger.abandon, own_ray):
                tuner.fit()
        except Exception:
            if searcher.error is None and not ledger.done:
                raise
        if searcher.error:
            raise searcher.error
    own_ray.end()


def _slots(ledger: SweepState, machine: Machine, gpus_per_trial: float | None, workers: int | None) -> dict[str, ResourceRequest]:
    """The slot of every cell, by its key; what does not fit is said."""
    placements = place(ledger.schedule.cells, machine, gpus_per_trial, workers)
    for problem in dict.fromkeys(placement.problem for placement in placements.values() if placement.problem):
        ledger.progress.say(f"memory: {problem}")
    return {key: placement.slot for key, placement in placements.items()}


def _bundle(slot: ResourceRequest) -> tune.PlacementGroupFactory:
    """What Tune keeps for a trial: its slot, or for a group, which Ray Train places, a seat for the process that waits for it."""
    alone = {"CPU": slot.cpus} | ({"GPU": slot.gpus} if slot.gpus else {})
    return tune.PlacementGroupFactory([alone if slot.n_workers == 1 else HEAD])


def _trial_name(trial: Any) -> str:
    return trial.trial_id


class CapacityPlanner:
    """Says for which cells there is room now, so that large trials get their place and small ones fill what is left.

    Args:
        ledger: what runs and what waits.
        slots: the slot of every cell, by its key.
        limit: trials at a time at the most.
        elastic: nodes may still join, if an autoscaler sees that trials wait.
    """

    def __init__(self, ledger: SweepState, slots: dict[str, ResourceRequest], limit: int | None, elastic: bool):
        self.ledger, self.slots, self.limit, self.ahead = ledger, slots, limit, AHEAD if elastic else 0
        self._totals, self._looked = (0.0, 0.0), float("-inf")
        self._seen: tuple | None = None
        self._more: dict[ResourceRequest, int] = {}
        self._is_uniform = len(set(slots.values())) == 1

    def __call__(self) -> Callable[[Cell], bool] | None:
        """Which cells there is room for; None: for none."""
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            there = ray.cluster_resources()
            self._totals, self._looked = (there.get("CPU", 0.0), there.get("GPU", 0.0)), time.monotonic()
        seen = self._totals, len(self.ledger.records.written), len(self.ledger.running)
        if seen != self._seen:  # between two calls trials only end, or only one starts
            started = self._seen is not None and seen == (*self._seen[:2], self._seen[2] + 1)
            if started and self._is_uniform:
                self._more = {slot: n - 1 for slot, n in self._more.items()}
            else:
                self._more = self._count()
            self._seen = seen
        if not any(n > 0 for n in self._more.values()):
            return None
        return lambda cell: self._more.get(self.slots[cell.key], 0) > 0

    def _count(self) -> dict[ResourceRequest, int]:
        """How many more trials of each slot there is room for."""
        in_flight = Counter(self.slots[trial.cell.key] for trial in self.ledger.running.values())
        ready: Counter[ResourceRequest] = Counter()
        for cell, n in self.ledger.waiting.items():
            ready[self.slots[cell.key]] += n
        more = trials_to_start(*self._totals, in_flight, ready, self.limit, self.ahead)
        self.ledger.progress.concurrency = max(1, in_flight.total() + sum(more.values()))
        return more
