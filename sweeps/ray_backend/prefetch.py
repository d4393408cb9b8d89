"""Fetch models and data on every node of a cluster before the first trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmft.errors import UserError
from sweeps.execution import Needs
from sweeps.planning import Cell


def fetch_on_every_node(cells: Iterable[Cell], say: Callable[[str], None]) -> None:
    """Fetch what the cells need on every node of the connected Ray cluster that runs trials, all at the same time.

    Nodes that join later fetch on their first trial; a node that goes away meanwhile is not waited for.

    Args:
        cells: what is going to run.
        say: prints a line.

    Raises:
        UserError: a node cannot fetch; the line begins with its address.
    """
    needs = Needs.of(cells)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    if not needs or not nodes:
        return
    say(f"fetching {needs} to {len(nodes)} node{'s' * (len(nodes) > 1)}; trials start when all have them")
    fetch = ray.remote(num_cpus=0, max_retries=0)(Needs.fetch)
    running = {
        fetch.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(needs): address
        for node, address in nodes.items()
    }
    while running:
        (done,), _ = ray.wait(list(running))
        address = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise UserError(f"node {address}: {error.cause}") from None
        except ray.exceptions.RayError as error:
            # Its process or the node is gone. If more than that is wrong, the trials there will tell.
            say(f"node {address} was lost while it fetched: {' '.join(str(error).split())[:200]}")
