"""`cluster.yaml` is what Ray's autoscaler accepts, and agrees with the rest of the repository."""

import copy
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_configuration():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(CONFIG)))


def test_every_node_runs_the_ray_that_is_tested():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert CONFIG["docker"]["image"].startswith(f"rayproject/ray:{pinned}-py311")


def test_resources_use_the_names_that_ray_knows():
    for node_type in CONFIG["available_node_types"].values():
        assert set(node_type["resources"]) <= {"CPU", "GPU"}  # 'gpu' would be a custom resource that no trial asks for


def test_the_mounted_folder_is_the_one_that_is_installed():
    (mounted,) = CONFIG["file_mounts"]
    assert any(f"--editable {mounted} " in command for command in CONFIG["setup_commands"])
