"""A sweep in a process of its own, as tests of faults need it: `python cluster_driver.py '{"plan": ..., "root": ..., ...}'`.

Options (JSON): plan, root; sleep_s of a trial; nodes: CPUs of each node of a local cluster, its head has none (without: Ray on this
machine); workers: trials at a time; hangs_at; kill: what dies once `kill_after` records are there: node, head.
Prints the outcome as one line of JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from support.fakes import fake_data, fake_model, fake_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.ray_backend import session
from sweeps.run import SweepOptions, run_sweep


def main(options: dict) -> None:
    root = Path(options["root"])
    plan, where = load_plan(options["plan"])
    cells = build_cells(plan, where, fake_model, fake_data)
    address = cluster = None
    if nodes := options.get("nodes"):
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
        workers = [cluster.add_node(num_cpus=n) for n in nodes]
        address = cluster.address
        session.HEAD_LOOK_S, session.HEAD_MISSES = 0.5, 4
    if options.get("kill"):

        def kill():
            while len(list(root.glob("trials/*/record.json"))) < options["kill_after"]:
                time.sleep(0.1)
            if options["kill"] == "head":
                os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
            else:
                cluster.remove_node(workers[0], allow_graceful=False)

        threading.Thread(target=kill, daemon=True).start()
    fake = {"log": str(root) + ".log", "sleep_s": options.get("sleep_s", 0.0), "hangs_at": options.get("hangs_at", 1e9)}
    try:
        how = SweepOptions(address=address, workers=options.get("workers"))
        outcome = run_sweep(plan, cells, root, how, run_trial=partial(fake_trial, **fake))
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps({"finished": outcome.n_finished, "failed": outcome.n_failed, "new": outcome.n_new}), flush=True)
    if cluster:
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
