"""What trials get, from the plan, the command line or the memory that they need."""

import math

import pytest
from support.fakes import fake_data, fake_model

from llmft.errors import UserError
from llmft.records.record import Cost
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan
from sweeps.resources.machine import GIB, Machine, Node, cluster_machine
from sweeps.resources.placement import CUDA_CONTEXT_BYTES, GPU_HEADROOM, PROCESS_BYTES, SHARES, cpu_need, device_need, place
from sweeps.resources.slots import ResourceRequest

MIB = 2**20


def gpus(n=1, gib=24.0, n_cpus=16, host_gib=256, elastic=False):
    return Machine((Node(n_cpus, n, host_gib * GIB, int(gib * GIB)),), elastic)


def cpus(n=8, host_gib=64.0):
    return Machine((Node(n, 0, int(host_gib * GIB)),))


@pytest.fixture
def small_cells_of(plan_file, tiny_model):
    """Cells of the small plan with the method `entry`; `models` in YAML."""

    def build(models=None, entry="lora"):
        plan, where = load_plan(str(plan_file(("n_test: 8", "n_test: 128"), model=models or tiny_model)))
        return [cell for cell in build_cells(plan, where) if cell.entry == entry]

    return build


@pytest.fixture
def unknown_cells(plan_file):
    """Cells of models that nothing is known of."""

    def build(models="fake"):
        plan, where = load_plan(str(plan_file(model=models)))
        return build_cells(plan, where, fake_model, fake_data)

    return build


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("{settings: {targets: [nowhere]}}", "methods.lora: method 'lora': settings.targets ['nowhere'] does not name linear layers"),
        (
            "{method: last_layers, settings: {n_layers: 99}}",
            "methods.lora: method 'last_layers': settings.n_layers is 99, and this model has",
        ),
    ],
)
def test_what_every_trial_would_fail_by_is_a_mistake(plan_file, tiny_model, lora, said):
    plan, where = load_plan(str(plan_file(("  lora: {search: {r: {choices: [2, 4]}}}", f"  lora: {lora}"), model=tiny_model)))
    with pytest.raises(UserError) as caught:
        place(build_cells(plan, where), cpus())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def slots_of(cells, *arguments, **options):
    return {placement.slot for placement in place(cells, *arguments, **options).values()}


@pytest.mark.parametrize(
    ("entry", "machine", "slot"),
    [
        ("gpus: 0.25", gpus(), ResourceRequest(gpus=0.25, cpus=4)),
        ("gpus: 1", gpus(2), ResourceRequest(gpus=1.0, cpus=8)),
        ("gpus: 4, parallel: fsdp", gpus(8, n_cpus=32), ResourceRequest(4, 4, 1.0, "fsdp")),
        ("gpus: 2, parallel: ddp", gpus(4), ResourceRequest(2, 4, 1.0, "ddp")),
        ("workers: 2, gpus: 2, parallel: ddp", gpus(4), ResourceRequest(2, 4, 1.0, "ddp")),
        ("workers: 2", gpus(4), ResourceRequest(2, 4, 1.0, "fsdp")),  # nothing tells whether the whole model fits one of them
        ("workers: 2, gpus: 0, parallel: ddp", gpus(4), ResourceRequest(2, 1, 0.0, "ddp")),
        ("workers: 2, parallel: fsdp", cpus(8), ResourceRequest(2, 1, 0.0, "fsdp")),
        ("workers: 3", cpus(8), ResourceRequest(3, 1, 0.0, "ddp")),
        ("gpus: 4, parallel: fsdp", cpus(8), ResourceRequest()),  # the plan is tried where there is no GPU
        ("gpus: 0", gpus(4), ResourceRequest()),
        ("gpus: 4", gpus(1, elastic=True), ResourceRequest(4, 1, 1.0, "fsdp")),  # nodes may still join
        ("gpus: 2, parallel: ddp", cluster_machine([{"CPU": 0.0}]), ResourceRequest(2, 1, 1.0, "ddp")),
    ],
)
def test_the_plan_says_what_a_model_gets(unknown_cells, entry, machine, slot):
    cells = unknown_cells(f"{{name: fake, {entry}}}")
    assert slots_of(cells, machine) == {slot}
    assert {cell.key for cell in cells} == {cell.key for cell in unknown_cells()}  # and no trial's digest knows of it


def test_each_model_has_its_own(unknown_cells):
    cells = unknown_cells("{name: small, gpus: 0.25}, {name: large, gpus: 4, parallel: fsdp}")
    slots = {key: placement.slot for key, placement in place(cells, gpus(4, n_cpus=32)).items()}
    assert {(cell.base.model.name, str(slots[cell.key])) for cell in cells} == {
        ("small", "0.25 GPU"),
        ("large", "4 GPUs, fsdp"),
    }
    assert slots.keys() == {cell.key for cell in cells}


@pytest.mark.parametrize(
    ("gpus_per_trial", "slot"),
    [
        (0.5, ResourceRequest(gpus=0.5, cpus=4)),
        (2.0, ResourceRequest(2, 8, 1.0, "fsdp")),
        (0.0, ResourceRequest()),
        (1.0, ResourceRequest(gpus=1.0, cpus=8)),
    ],
)
def test_the_command_line_goes_before_the_plan(unknown_cells, gpus_per_trial, slot):
    cells = unknown_cells("{name: fake, gpus: 0.25}, {name: other, workers: 2, gpus: 0}")
    assert slots_of(cells, gpus(2), gpus_per_trial) == {slot}


@pytest.mark.parametrize(
    ("models", "machine", "gpus_per_trial", "said"),
    [
        ("{name: fake, gpus: 4}", gpus(2), None, "models: fake: gpus: 4 asked for, but this machine has 2 GPUs. Lower it"),
        ("{name: fake, workers: 4}", gpus(2), None, "models: fake: workers: 4 asked for"),
        ("fake", gpus(2), 3.0, "--gpus-per-trial: 3 asked for, but this machine has 2 GPUs"),
        ("fake", cpus(), 1.0, "--gpus-per-trial: 1 asked for, but this machine has 0 GPUs"),
        ("fake", gpus(2), 1.5, "--gpus-per-trial: a share of one GPU, or a whole number of them (got 1.5)"),
    ],
)
def test_more_than_there_is_is_refused(unknown_cells, models, machine, gpus_per_trial, said):
    with pytest.raises(UserError) as caught:
        place(unknown_cells(models), machine, gpus_per_trial)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("gib", [0.52, 0.6, 1.1, 1.6, 2.2, 2.7, 4.3, 24])
def test_by_default_as_many_trials_share_a_gpu_as_it_holds(small_cells_of, gib):
    for placement in place(small_cells_of(), gpus(2, gib, n_cpus=32)).values():
        need = GPU_HEADROOM * placement.memory.device_bytes + CUDA_CONTEXT_BYTES
        n_trials = max(n for n in SHARES if n * need <= gib * GIB)
        assert placement.slot.n_fitting(None, 2) == 2 * n_trials and n_trials * placement.slot.gpus <= 1
        assert placement.slot.n_fitting(32, 2) == 2 * n_trials and not placement.problem


def test_shares_leave_every_process_a_cpu_and_the_hosts_memory(small_cells_of):
    cells = small_cells_of()
    assert {slot.n_fitting(None, 1) for slot in slots_of(cells, gpus(n_cpus=4))} == {4}
    assert {slot.n_fitting(None, 1) for slot in slots_of(cells, gpus(n_cpus=1))} == {1}
    assert {slot.n_fitting(None, 1) for slot in slots_of(cells, gpus(host_gib=5))} == {3}  # of 1.5 GiB each
    assert {slot.cpus for slot in slots_of(cells, gpus(n_cpus=16), limit=2)} == {8}


def test_what_does_not_fit_one_gpu_takes_smaller_passes_then_several(small_cells_of):
    cells = small_cells_of()
    (whole,) = {p.memory.device_bytes for p in place(cells, gpus()).values()}
    small = (CUDA_CONTEXT_BYTES + GPU_HEADROOM * whole * 0.7) / GIB
    placement, *_ = place(cells, gpus(gib=small)).values()
    assert placement.slot.micro_batch_tokens == 1024 and placement.slot.gpus == 1.0 and not placement.problem
    assert device_need(placement.memory) <= small * GIB < GPU_HEADROOM * whole + CUDA_CONTEXT_BYTES
    tiny = 0.5 + 0.3 / 1024
    for n, elastic, expected in [(1, False, 1), (3, False, 2), (8, False, 8), (1, True, 16)]:
        placement, *_ = place(cells, gpus(n, tiny, elastic=elastic)).values()
        assert (placement.slot.n_workers, placement.slot.gpus) == (expected, 1.0)
        assert placement.slot.strategy == ("fsdp" if expected > 1 else "none")
        assert "a process needs" in placement.problem and "GPU" in placement.problem


def test_without_gpus_no_more_trials_start_than_the_memory_holds(small_cells_of):
    cells = small_cells_of()
    assert {slot.cpus for slot in slots_of(cells, cpus(8))} == {1}
    assert {slot.cpus for slot in slots_of(cells, cpus(8), limit=3)} == {2}
    for host_gib in (1.6, 3.3, 5.0, 7.0, 9.9):
        for placement in list(place(cells, cpus(8, host_gib)).values())[:1]:
            n_trials = 8 // placement.slot.cpus
            assert n_trials * cpu_need(placement.memory) <= host_gib * GIB
            assert n_trials >= math.floor(host_gib * GIB / cpu_need(placement.memory)) / 2  # CPUs come in whole numbers
    (problem,) = {p.problem for p in place(cells, cpus(8, 1.0)).values()}
    assert "the host's memory has 1.0" in problem


def test_many_processes_at_a_time_must_fit_the_host(small_cells_of):
    (problem,) = {p.problem for p in place(small_cells_of(), gpus(host_gib=4), 0.125).values()}
    assert "8 at a time need 12" in problem and "Use --workers 2." in problem
    assert {p.problem for p in place(small_cells_of(), gpus(host_gib=4), 0.125, limit=2).values()} == {""}


def test_several_gpus_hold_a_model_each_where_it_fits(small_cells_of, tiny_model):
    cells = small_cells_of(f"{{name: {tiny_model}, gpus: 2}}")
    assert {slot.strategy for slot in slots_of(cells, gpus(2))} == {"ddp"}


def test_nothing_known_is_said_and_takes_a_whole_gpu(unknown_cells):
    for placement in place(unknown_cells(), gpus()).values():
        assert placement.slot == ResourceRequest(gpus=1.0, cpus=16) and placement.memory is None and "model" in placement.unknown
    assert {p.slot for p in place(unknown_cells(), cpus()).values()} == {ResourceRequest()}


def test_a_measured_peak_above_the_estimate_replaces_it(small_cells_of):
    cells = small_cells_of()
    estimated = place(cells, gpus()).values()
    lower, higher, on_cpu = (
        place(cells, gpus(), costs={cells[0].key: [Cost(wall_s=1, device=device, peak_memory_bytes=n_bytes)]}).values()
        for device, n_bytes in (("cuda", 1024), ("cuda", 6 * GIB), ("cpu", 6 * GIB))
    )
    whole = {placement.slot for placement in estimated}
    assert {placement.slot for placement in lower} == whole == {placement.slot for placement in on_cpu}
    assert {placement.memory.device_bytes for placement in higher} == {6 * GIB}
    assert {placement.slot.n_fitting(None, 1) for placement in higher} == {3}  # of 7.7 GiB with head-room, in 24


def test_a_gpu_of_unknown_size_is_not_shared(small_cells_of):
    machine = cluster_machine([{"CPU": 8.0, "GPU": 2.0}])
    assert slots_of(small_cells_of(), machine) == {ResourceRequest(gpus=1.0)}
    assert all(0.1 < slot.gpus < 1 for slot in slots_of(small_cells_of(), cluster_machine([{"CPU": 8.0, "GPU": 1.0}], 8.0)))
    assert PROCESS_BYTES > 0
