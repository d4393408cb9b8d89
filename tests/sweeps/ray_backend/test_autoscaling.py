"""A sweep on a cluster that has no worker at its start: Ray's autoscaler, with nodes that are processes on this machine."""

import json
from collections import Counter

import pytest
from support.ray_cluster import RayCluster
from support.runs import executed

from sweeps.store.store import Store

pytestmark = pytest.mark.ray

NODE_TYPES = {
    "small": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2},
    "big": {"resources": {"CPU": 4, "GPU": 4}, "max_workers": 1},
}

DRIVER = """
import json, os, sys
from functools import partial
import ray
from support.fakes import fake_data, fake_model, fake_trial
from rich.console import Console
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.run import SweepOptions, run_sweep

address, plan_file, results, log, workers, gpus = sys.argv[1:]

def on_a_node(spec, runtime):
    with open(log + ".nodes", "a") as file:
        print(os.environ["RAY_NODE_TYPE_NAME"], ray.get_gpu_ids(), file=file)
    return fake_trial(spec, runtime, log=log, sleep_s=0.2)

plan, where = load_plan(plan_file)
cells = build_cells(plan, where, fake_model, fake_data)
outcome = run_sweep(
    plan, cells, results, SweepOptions(address=address, workers=int(workers) or None, gpus_per_trial=float(gpus)), run_trial=on_a_node,
    console=Console(stderr=True),
)
print(json.dumps([outcome.n_finished, outcome.n_failed, outcome.n_new]))
"""


@pytest.fixture
def cluster():
    with RayCluster(NODE_TYPES, idle_s=3) as cluster:
        yield cluster
    assert not cluster.processes() and not cluster.folder.exists()


def test_nodes_come_when_trials_wait_and_go_when_they_have_run(cluster, plan_file, tmp_path):
    assert cluster.n_nodes() == 0
    log = tmp_path / "log"
    out, error = cluster.drive(DRIVER, plan_file(), tmp_path / "results", log, 3, 1).communicate(timeout=270)
    assert out and json.loads(out) == [26, 0, 26], error
    assert "starting workers ..." in error  # what is said of a cluster that grows slowly hangs on its pace: see test_progress
    records = Store(tmp_path / "results").load()
    assert Counter(executed(log)) == Counter(records.keys())
    assert all(record.finished for record in records.values())
    nodes = (tmp_path / "log.nodes").read_text().splitlines()
    assert len(nodes) == 26 and {line.split()[0] for line in nodes} <= set(NODE_TYPES)
    cluster.wait(lambda: cluster.n_nodes() == 0, 60, "idle nodes were ended")


TWO_SIZES = (
    ("models: [fake]", "models: [{name: large, workers: 4, parallel: ddp}, small]"),
    ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""),
    ("n_shots: [2, 4]", "n_shots: [2]"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1]"),
    ("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null"),
)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_trials_of_two_sizes_all_get_their_place(plan_file, tmp_path):
    """One machine of the large size, two of the small; trials of four workers that nothing else can hold, and of one."""
    log = tmp_path / "log"
    types = {name: node | {"resources": {"CPU": node["resources"]["CPU"]}} for name, node in NODE_TYPES.items()}
    with RayCluster(types, idle_s=3) as cluster:
        out, error = cluster.drive(DRIVER, plan_file(*TWO_SIZES), tmp_path / "results", log, 0, 0).communicate(timeout=500)
    assert out and json.loads(out) == [4, 0, 4], error
    assert set(executed(log)) == set(Store(tmp_path / "results").load())
    assert not cluster.processes()
