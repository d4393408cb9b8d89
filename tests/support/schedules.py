"""Schedules of made-up cells, and how their trials end."""

import random
from functools import lru_cache

from support.fakes import fake_data, fake_model, fake_record, fake_training
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.search.schedule import Schedule


def finish(schedule, records, rng, causes=lambda spec: None, stop_after=None, run=None):
    """Run trials in a random order, several at a time, until nothing is left or `stop_after` have ended."""
    run = run or (lambda trial: fake_record(trial.spec, causes(trial.spec)))
    running, n = {}, 0
    while stop_after is None or n < stop_after:
        ready = [trial for trial in schedule.ready(records) if trial.digest not in running]
        running |= {trial.digest: trial for trial in rng.sample(ready, min(len(ready), rng.randint(1, 4)))}
        if not running:
            break
        trial = running.pop(rng.choice(list(running)))
        records[trial.digest] = run(trial)
        n += 1
    return records


def outcome(schedule, records):
    trials = sorted(trial.digest for trial in schedule.known(records))
    return trials, [(choice.cell.key, choice.params, choice.dev_score) for choice in schedule.choices(records)]


@lru_cache
def searched_cells(sampler, rule, seed=0):
    """Two cells that search the same ranges; one of them also searches `alpha`, so they share points."""
    prune = {"rule": rule, "min_epochs": 2, "reduction_factor": 2, "min_points": 2} if rule else None
    grid = sampler == "grid"
    search = {
        "schedule": {"choices": ["constant", "linear"]},
        "warmup_ratio": {"choices": [0.1, 0.4]},
        "learning_rate": {"choices": [1e-5, 1e-4, 1e-3, 1e-2] if grid else [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
    }
    plan = parse_plan(
        {
            "models": ["fake"], "tasks": ["toy"], "n_shots": [2], "train": {"epochs": 12},
            "methods": {
                "lora": {"search": search | {"alpha": {"choices": [16] if grid else [8, 16]}}},
                "lora_r": {"method": "lora", "settings": {"lora_dropout": 0.0, "r": 8, "alpha": 16}, "search": search},
            },
            "search": {"n_trials": 16, "seeds": [100, 101], "round_size": 3, "sampler": sampler, "seed": seed, "prune": prune},
            "report": {"seeds": [0, 1]},
        },
        "plan",
    )  # fmt: skip
    return build_cells(plan, "plan", fake_model, fake_data)


def honest(trial):
    return fake_training(trial.spec, trial.stop_below)


@lru_cache
def undisturbed(sampler, rule):
    """The records and the outcome of a sweep that nothing stops."""
    cells = searched_cells(sampler, rule)
    records = finish(Schedule(cells), {}, random.Random(0), run=honest)
    return records, outcome(Schedule(cells), records)
