"""Fetching on the nodes of a cluster: real Ray nodes, each with a cache of its own, and a real HTTP server for a hub."""

import io
import os

import pytest
from rich.console import Console
from support.fakes import fake_data, fake_record
from support.hub_server import HubServer
from support.ray_cluster import RayCluster

from llmft import hub
from llmft.config.spec import DataRef, ModelRef
from llmft.trial.result import TrialResult
from sweeps.execution.prefetch import Needs
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.run import SweepOptions, run_sweep
from sweeps.store.store import Store

DRIVER = """
import os, sys
from llmft.trial.run import TrialResult
from support.fakes import fake_data, fake_record
from rich.console import Console
from llmft import hub
from llmft.errors import UserError
from llmft.config.spec import ModelRef
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.run import SweepOptions, run_sweep

address, plan_file, results = sys.argv[1:]

def pinned(name, revision):
    commit = hub.pin(name, revision)
    return ModelRef(name=name, revision=commit, fingerprint=commit)

def needs_no_hub(spec, runtime):
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    from llmft import hub
    hub.fetch_model(spec.model.name, spec.model.revision)
    return TrialResult(fake_record(spec))

plan, where = load_plan(plan_file)
cells = build_cells(plan, where, pinned, fake_data)
try:
    options = SweepOptions(address=address, workers=2)
    run_sweep(plan, cells, results, options, run_trial=needs_no_hub, console=Console(stderr=True, width=500))
except UserError as error:
    print("llmft:", error, file=sys.stderr)
"""


@pytest.mark.long  # test_hub has the same for processes of one machine
@pytest.mark.ray
def test_every_node_fetches_once_before_the_first_trial(tmp_path, plan_file, tiny_model):
    cells = (
        "  zero_shot:\n  in_context: {n_shots: [2]}\n  lora: {search: {r: {choices: [2, 4]}}}\n",
        "  in_context: {n_shots: [2]}\n",
    )
    plan = plan_file(cells, model="owner/small")
    here = {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    with HubServer() as server, RayCluster() as cluster:
        server.push_folder("owner/small", tiny_model)
        online = here | {"HF_ENDPOINT": server.address}

        def start(results: str):
            return cluster.drive(DRIVER, plan, tmp_path / results, **online, HF_HOME=str(tmp_path / "driver"))

        def add(name: str) -> None:
            cluster.add_node(name, **online, HF_HOME=str(tmp_path / name))

        add("one")
        add("two")
        _, said = start("first").communicate(timeout=120)
        assert said.count("fetching owner/small to 2 nodes") == 1 and "3/3 trials" in said, said
        text = set(os.listdir(tiny_model)) - {"model.safetensors"}  # which the driver needs as well
        assert server.n_fetched() == dict.fromkeys(text, 3) | {"model.safetensors": 2}

        server.asked.clear()
        server.held = "model.safetensors"
        add("three")
        driver = start("second")
        cluster.wait(lambda: "model.safetensors" in server.n_fetched(), 60, "the third node fetches")
        cluster.kill_node("three")
        server.go.set()
        _, said = driver.communicate(timeout=120)
        assert "was lost while it fetched" in said and "3/3 trials" in said, said
        assert server.n_fetched() == dict.fromkeys(os.listdir(tiny_model), 1)  # the others had them

        cluster.add_node("four", **here, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "four"))
        _, said = start("third").communicate(timeout=120)
        (line,) = [line for line in said.splitlines() if line.startswith("llmft:")]
        assert line.startswith("llmft: node 1") and "owner/small" in line and "http://127.0.0.1:9 cannot be reached" in line, line
    assert [len(Store(tmp_path / results).load()) for results in ("first", "second", "third")] == [3, 3, 0]


def test_only_what_comes_from_the_hub_is_needed(plan_file):
    plan, where = load_plan(str(plan_file()))
    commits = (("owner/rows", "main", "c" * 40),)

    def needs(path: str | None, data: DataRef) -> Needs:
        model = ModelRef(name="owner/small", revision="a" * 40, fingerprint="x", path=path)
        return Needs.of(build_cells(plan, where, lambda name, revision: model, lambda task, directory: data))

    assert not needs("/a/folder", DataRef(fingerprint="x", directory="/rows"))
    assert str(needs(None, DataRef(fingerprint="x"))) == "owner/small"
    assert str(needs("/a/folder", DataRef(fingerprint="x", commits=commits))) == "the rows of toy"


def test_a_model_that_has_moved_is_said(plan_file, tmp_path):
    plan, where = load_plan(str(plan_file()))

    def run(commit: str) -> str:
        """A sweep whose model is fetched already, with trials that take no time; gives what it said."""
        model = ModelRef(name="owner/small", revision=commit, fingerprint=commit)
        cells = build_cells(plan, where, lambda name, revision: model, fake_data)
        page = io.StringIO()
        console, options = Console(file=page, width=500), SweepOptions(serial=True)
        run_sweep(plan, cells, tmp_path / "results", options, console=console, run_trial=lambda spec, _: TrialResult(fake_record(spec)))
        return page.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "fetch_model", lambda name, revision: tmp_path)
        assert "at commit" not in run("a" * 40) + run("a" * 40)
        said = run("b" * 40)
    assert said.count(f"owner/small at commit {'a' * 40}, the plan means {'b' * 40}") == 1
    assert f"{{name: owner/small, revision: {'a' * 40}}}" in said
