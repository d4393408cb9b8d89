"""A sweep's trials on Ray: places and workers are Ray's, every decision is the schedule's, every result the store's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeps.session import muted, ray_session, scratch_folder, watched_head  # isort: skip - before Ray, which reads the environment that it sets

import ray
from ray import tune

from llmft.errors import UserError
from sweeps.prefetch import fetch_on_every_node
from sweeps.run import Ledger
from sweeps.schedule import Planned
from sweeps.searcher import Overseer, ScheduleSearcher
from sweeps.trainable import TrialTrainable


def run_on_ray(
    ledger: Ledger,
    *,
    address: str | None,
    workers: int | None,
    gpus_per_trial: float | None,
    run_trial: Callable[..., Any] | None,
    verbose: bool,
) -> None:
    """Run the ledger's trials; the arguments are those of `sweeps.run.run_sweep`."""
    root = ledger.store.root
    ledger.progress.status("starting Ray ...")
    with (
        muted(verbose),
        scratch_folder(root.absolute() if address and isinstance(root, Path) else None) as scratch,
        ray_session(address, workers, scratch, verbose),
    ):
        if address:
            cells = [state.cell for state in ledger.schedule.states(ledger.records)]
            fetch_on_every_node(cells, ledger.progress.say)
        slots = share_out(ray.cluster_resources(), address, workers, gpus_per_trial)
        ledger.progress.concurrency = slots["n"]
        common = {
            "root": str(root.absolute()),
            "scratch": str(scratch),
            "n_threads": slots["CPU"],
            "run_trial": run_trial,
        }

        def job_of(trial: Planned) -> dict[str, Any]:
            return {
                **common,
                "digest": trial.digest,
                "spec": trial.spec.model_dump_json(),
                "slot": {"n_workers": 1, "cpus": slots["CPU"], "gpus": slots["GPU"]},
                **ledger.runtime_settings(trial),
            }

        def fits():
            full = len(ledger.running) >= slots["n"]
            return lambda cell: not full

        searcher = ScheduleSearcher(ledger, job_of, fits)
        ledger.progress.status("starting workers ...")
        tuner = tune.Tuner(
            tune.with_resources(TrialTrainable, {"CPU": slots["CPU"], "GPU": slots["GPU"]}),
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
                callbacks=[Overseer(searcher)],
                failure_config=tune.FailureConfig(max_failures=-1),  # the searcher counts
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            with watched_head(ledger.abandon):
                tuner.fit()
        except Exception:
            if searcher.error is None:
                raise
        if searcher.error:
            raise searcher.error


def _trial_name(trial: Any) -> str:
    return trial.trial_id


def share_out(
    resources: dict[str, float], address: str | None, workers: int | None, gpus_per_trial: float | None
) -> dict[str, Any]:
    """How many trials run at a time (`n`), and the CPUs and GPUs that each gets (`CPU`, `GPU`).

    On a cluster a trial gets one CPU, since nodes differ and may still join; `workers` may then be more than there is room for.

    Raises:
        UserError: more GPUs are asked for than this machine has.
    """
    n_cpus, n_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    gpus = (1.0 if n_gpus else 0.0) if gpus_per_trial is None else gpus_per_trial
    if gpus > n_gpus and not address:
        raise UserError(f"--gpus-per-trial: {gpus:g} asked for, but Ray sees {n_gpus:g} GPUs on this machine.")
    if gpus and gpus < 1:
        room = int(n_gpus) * int(1 / gpus)
    else:
        room = int(n_gpus // gpus) if gpus else n_cpus
    n = workers or max(1, room)
    return {"n": n, "CPU": 1 if address else max(1, n_cpus // n), "GPU": gpus}
