"""Run a sweep's trials on Ray Tune: Ray places and starts workers, the schedule decides, the store holds the results."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sweeps.ray_backend.session import muted, ray_session, watched_head  # isort: skip - before Ray, which reads the environment that it sets
import ray
from ray import tune

from sweeps.execution import SweepState
from sweeps.planning import Cell
from sweeps.ray_backend.prefetch import fetch_on_every_node
from sweeps.ray_backend.scratch import scratch_folder
from sweeps.ray_backend.searcher import ScheduleSearcher, SweepCallback
from sweeps.ray_backend.worker import TrialTrainable, read_job, slot_in
from sweeps.resources import Machine, ResourceRequest, cluster_machine, local_machine, measured_costs, place, trials_to_start
from sweeps.search import PlannedTrial

CHECK_EVERY_S = 2.0
AHEAD = 4
"""Trials that wait for nodes to come, on a cluster: about so many are asked of an autoscaler at a time."""

HEAD = {"node:__internal_head__": 0.001}
"""Where the process waits that a group of workers reports to: the head is always there, and needs no CPU for it."""


def run_on_ray(
    state: SweepState,
    *,
    address: str | None,
    workers: int | None,
    gpus_per_trial: float | None,
    run_trial: Callable[..., Any] | None,
    verbose: bool,
) -> None:
    """Run the trials of `state`; the other arguments are those of `sweeps.run.SweepOptions`."""
    root, cells, machine = state.store.root, state.schedule.cells, None
    requests: dict[str, ResourceRequest] = {}
    if not address:  # mistakes show before Ray starts
        machine = local_machine(state.plan.device_memory)
        requests = _requests(state, machine, gpus_per_trial, workers)
    n_cpus = max([workers or 1, *(request.total_cpus for request in requests.values())])
    state.progress.status("starting Ray ...")
    with (
        muted(verbose),
        scratch_folder(root.absolute() if address and isinstance(root, Path) else None) as scratch,
        ray_session(address, verbose, n_cpus, groups=any(request.n_workers > 1 for request in requests.values())),
    ):
        if address:
            fetch_on_every_node(cells, state.progress.say)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            requests = _requests(state, cluster_machine(nodes, state.plan.device_memory), gpus_per_trial, workers)
        common = {"root": str(root.absolute()), "scratch": str(scratch), "folder": None if address else os.getcwd()}
        jobs = Jobs(state, requests, common, run_trial)
        planner = CapacityPlanner(state, requests, workers, elastic=bool(address))
        searcher = ScheduleSearcher(state, jobs.config_of, jobs.request_of, planner)
        try:
            with watched_head(state.abandon):
                _tuner(searcher, set(requests.values()), scratch).fit()
        except Exception:
            if searcher.error is None and not state.done:
                raise
        if searcher.error:
            raise searcher.error


class Jobs:
    """Turn trials into Tune configurations.

    Args:
        requests: what each cell's trials get, by the cell's key.
        common: what all jobs hold.
        run_trial: what runs a trial in place of llmft's function.
    """

    def __init__(
        self, state: SweepState, requests: dict[str, ResourceRequest], common: dict[str, Any], run_trial: Callable[..., Any] | None
    ):
        self.state, self.requests, self.common, self.run_trial = state, requests, common, run_trial

    def request_of(self, trial: PlannedTrial) -> ResourceRequest:
        return self.requests[trial.cell.key]

    def config_of(self, trial: PlannedTrial) -> dict[str, Any]:
        request = self.request_of(trial)
        job = {
            **self.common,
            "digest": trial.digest,
            "spec": trial.spec.model_dump_json(),
            "slot": asdict(request),
            "strategy": request.strategy,
            "n_threads": request.cpus,
            "micro_batch_tokens": request.micro_batch_tokens,
            **self.state.runtime_settings(trial),
        }
        # one text: Tune copies, flattens and writes down every key of a configuration, several times a trial
        return {"job": json.dumps(job)} | ({"run_trial": self.run_trial} if self.run_trial else {})


def _tuner(searcher: ScheduleSearcher, requests: set[ResourceRequest], scratch: Path) -> tune.Tuner:
    """Build the Tuner; where all trials get the same, the request is a constant, which Tune reuses workers by."""
    bundle = _bundle(next(iter(requests))) if len(requests) == 1 else lambda config: _bundle(slot_in(read_job(config)))
    return tune.Tuner(
        tune.with_resources(TrialTrainable, bundle),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[SweepCallback(searcher)],
            failure_config=tune.FailureConfig(max_failures=-1),  # the searcher counts
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _requests(state: SweepState, machine: Machine, gpus_per_trial: float | None, workers: int | None) -> dict[str, ResourceRequest]:
    """Place every cell's trials, by the cell's key; say what does not fit."""
    costs = measured_costs(state.schedule.states(state.records), state.records)
    placements = place(state.schedule.cells, machine, gpus_per_trial, workers, costs)
    for problem in dict.fromkeys(placement.problem for placement in placements.values() if placement.problem):
        state.progress.say(f"memory: {problem}")
    return {key: placement.slot for key, placement in placements.items()}


def _bundle(slot: ResourceRequest) -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial: its request, or, for a group that Ray Train places, room for the process that waits for it."""
    alone = {"CPU": slot.cpus} | ({"GPU": slot.gpus} if slot.gpus else {})
    return tune.PlacementGroupFactory([alone if slot.n_workers == 1 else HEAD])


def _trial_name(trial: Any) -> str:
    return trial.trial_id


class CapacityPlanner:
    """Decide for which cells there is room now, so that large trials are placed and small ones fill what is left.

    Args:
        state: what runs and what waits.
        requests: what each cell's trials get, by the cell's key.
        limit: trials at a time at the most.
        elastic: nodes may still join, if an autoscaler sees that trials wait.
    """

    def __init__(self, state: SweepState, requests: dict[str, ResourceRequest], limit: int | None, elastic: bool):
        self.state, self.requests, self.limit, self.ahead = state, requests, limit, AHEAD if elastic else 0
        self._totals, self._checked = (0.0, 0.0), float("-inf")
        self._known: tuple | None = None
        self._more: dict[ResourceRequest, int] = {}
        self._is_uniform = len(set(requests.values())) == 1

    def __call__(self) -> Callable[[Cell], bool] | None:
        """Which cells there is room for; None: for none."""
        if time.monotonic() - self._checked > CHECK_EVERY_S:
            there = ray.cluster_resources()
            self._totals, self._checked = (there.get("CPU", 0.0), there.get("GPU", 0.0)), time.monotonic()
        known = self._totals, len(self.state.records.written), len(self.state.running)
        if known != self._known:  # between two calls trials only end, or only one starts
            started = self._known is not None and known == (*self._known[:2], self._known[2] + 1)
            if started and self._is_uniform:
                self._more = {request: n - 1 for request, n in self._more.items()}
            else:
                self._more = self._count()
            self._known = known
        if not any(n > 0 for n in self._more.values()):
            return None
        return lambda cell: self._more.get(self.requests[cell.key], 0) > 0

    def _count(self) -> dict[ResourceRequest, int]:
        """Count for each request how many more trials there is room for."""
        in_flight = Counter(self.requests[trial.cell.key] for trial in self.state.running.values())
        ready: Counter[ResourceRequest] = Counter()
        for cell, n in self.state.waiting.items():
            ready[self.requests[cell.key]] += n
        more = trials_to_start(*self._totals, in_flight, ready, self.limit, self.ahead)
        self.state.progress.concurrency = max(1, in_flight.total() + sum(more.values()))
        return more
