import os

import pytest

from sweeps.resources import machine as devices
from sweeps.resources.machine import GIB, GPU_TYPES, Machine, Node, cluster_machine, find_gpu_type, local_machine

A10G = {
    "CPU": 16.0,
    "GPU": 4.0,
    "memory": 1e11,
    "object_store_memory": 3e10,
    "node:10.0.0.1": 1.0,
    "accelerator_type:A10G": 1.0,
}


@pytest.mark.parametrize(
    ("name", "gpu_type"),
    [
        ("A10G", "A10G"), ("A100-80G", "A100-80G"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S"), ("Tesla T4", "T4"), ("NVIDIA GeForce RTX 4090", None), ("", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_rays_name_and_by_the_drivers(name, gpu_type):
    assert find_gpu_type(name) == gpu_type


def test_a_cluster_is_as_small_as_its_smallest_gpu():
    head, large = {"CPU": 0.0, "memory": 8e9}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    machine = cluster_machine([head, A10G, large])
    assert (machine.n_cpus, machine.n_gpus, machine.elastic) == (112, 12, True)
    assert machine.gpu_node == Node(16, 4, int(1e11), int(GPU_TYPES["A10G"].memory_gib * GIB), "A10G")
    assert "A10G with 22 GiB" in str(machine) and "more may join" in str(machine)


def test_unknown_memory_stays_unknown_until_it_is_told():
    strange = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:GeForce-RTX-4090": 1.0}
    assert cluster_machine([strange]).gpu_node == Node(4, 1, None, None, "GeForce-RTX-4090")
    assert cluster_machine([A10G, strange]).gpu_node.gpu_bytes is None  # a trial may land there
    assert cluster_machine([strange, A10G], device_memory_gib=24).gpu_node.gpu_bytes == 24 * GIB
    assert cluster_machine([{"CPU": 4.0}]).gpu_node is None


def test_this_computer(monkeypatch):
    machine = local_machine()
    (node,) = machine.nodes
    assert 1 <= node.n_cpus <= os.cpu_count() and not machine.elastic
    with open("/proc/meminfo") as file:
        assert 0 < node.host_bytes <= int(file.readline().split()[1]) * 1024
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    elsewhere = local_machine(device_memory_gib=40)
    assert elsewhere == Machine((Node(0, 1, None, 40 * GIB),), elastic=True)


@pytest.mark.parametrize(
    ("files", "n_cpus", "memory"),
    [
        ({"cpu.max": "250000 100000\n", "memory.max": f"{GIB}\n"}, 2, GIB),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, 8, 16 * GIB),
        ({"cpu.max": "50000 100000\n", "memory.max": f"{64 * GIB}\n"}, 1, 16 * GIB),
        (
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": f"{GIB}"},
            3,
            GIB,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, 16 * GIB),
        ({}, 8, 16 * GIB),
    ],
)
def test_a_container_may_use_less_than_the_computer_has(tmp_path, monkeypatch, files, n_cpus, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 4 * 2**20, "SC_PAGE_SIZE": 4096}.get)
    assert (devices.usable_cpus(), devices.host_memory_bytes()) == (n_cpus, memory)
