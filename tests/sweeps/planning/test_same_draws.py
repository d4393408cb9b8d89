"""A pool that holds no more than the shots gives every seed the same ones: a plan says so before it runs."""

from __future__ import annotations

import json

import pytest

from llmft.tasks._toy_language import toy_data
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.resources.workload import largest_workload


@pytest.fixture
def same_shots(tmp_path, tiny_model):
    """Whether the trials with `n_shots` of a task with 8 examples in its pool, and dev examples of its own, all draw the same."""
    for name, pairs in (("train", toy_data().train[:8]), ("dev", toy_data().train[8:40]), ("test", toy_data().in_domain[:8])):
        rows = [{"premise": pair.premise, "hypothesis": pair.hypothesis, "label": pair.label} for pair in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test")}
    task = {"name": "tiny", "train": files["train"], "dev": files["dev"], "test": {"in_domain": files["test"]}}
    task |= {"patterns": {"minimal": "{premise} {hypothesis} ?"}, "verbalizers": {"words": ["Yes", "No"]}}

    def find(n_shots: int, **changed) -> bool:
        content = {"models": [tiny_model], "tasks": [task], "methods": {"pattern": {"n_shots": [n_shots]}}, "n_dev": 8, **changed}
        return largest_workload(build_cells(parse_plan(content, "plan"))).same_shots

    return find


def test_a_pool_as_small_as_the_shots_is_noticed(same_shots):
    assert same_shots(8) and not same_shots(6)


def test_what_shall_be_the_same_is_no_fault(same_shots):
    assert not same_shots(8, report={"seeds": [0, 1], "vary": ["init"]})
    assert not same_shots(8, report={"seeds": [0]})
