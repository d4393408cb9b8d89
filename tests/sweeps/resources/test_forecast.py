"""Time and disk, against arithmetic by hand."""

import dataclasses
import math

import pytest
from support.fakes import fake_record

from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.batches import QueryBatch
from llmft.runtime import Runtime
from llmft.tasks._registry import load_task
from llmft.trial.forgetting import measure
from llmft.trial.run import run_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.resources.forecast import UTILISATION, flops, n_left, remaining_disk, remaining_s, remaining_time
from sweeps.resources.machine import GIB, Machine, Node
from sweeps.resources.memory import Memory
from sweeps.resources.placement import Placement, place
from sweeps.resources.slots import ResourceRequest
from sweeps.resources.workload import PromptSet, ScoredPrompts, Workload, largest_workload
from sweeps.run import SweepOptions, run_sweep
from sweeps.search.schedule import Schedule

LAPTOP = Machine((Node(4),))


def ended(trial, wall_s):
    record = fake_record(trial.spec)
    return record.model_copy(update={"cost": record.cost.model_copy(update={"wall_s": wall_s})})


@pytest.fixture
def lora_cell(small_cells):
    """One cell: 4 points on 2 seeds, in rounds of 2, then 3 reported trials."""
    _, cells = small_cells(
        ("  zero_shot:\n  in_context: {n_shots: [2]}\n", ""), ("n_shots: [2, 4]", "n_shots: [2]"), ("epochs: 2", "epochs: 3")
    )
    (cell,) = cells
    return cell


def test_nothing_is_invented_where_nothing_is_known(lora_cell):
    schedule = Schedule([lora_cell])
    (state,) = schedule.states({})
    assert n_left(state, {}) == {"search": 8, "report": 3}
    assert remaining_s([state], {}, 2) is None
    assert remaining_time([state], {}, {lora_cell.key: Placement(ResourceRequest())}, LAPTOP, None) is None


def test_trials_take_as_long_as_those_most_like_them(lora_cell):
    schedule, records = Schedule([lora_cell]), {}
    for trial in schedule.ready({})[:2]:
        records[trial.digest] = ended(trial, 10.0)
    (state,) = schedule.states(records)
    assert n_left(state, records) == {"search": 6, "report": 3}
    assert remaining_s([state], records, 3) == pytest.approx((6 + 3) * 10 / 3)  # a search trial is the nearest to a reported one
    while len(records) < 8:
        records |= {trial.digest: ended(trial, 10.0) for trial in schedule.ready(records)}
    first, *_ = schedule.ready(records)
    assert first.spec.test_sets != ()
    records[first.digest] = ended(first, 40.0)
    (state,) = schedule.states(records)
    assert n_left(state, records) == {"search": 0, "report": 2}
    assert remaining_s([state], records, 1) == pytest.approx(2 * 40)
    slot = ResourceRequest(cpus=2)
    time = remaining_time([state], records, {lora_cell.key: Placement(slot)}, LAPTOP, None)
    assert (time.wall_s, time.device_s, time.on_gpu, time.source) == (40, 2 * 40 * 2, False, "records")
    assert remaining_time([state], records, {lora_cell.key: Placement(slot)}, LAPTOP, 1).wall_s == 80


def test_arithmetic_where_the_gpu_is_known(lora_cell):
    spec = lora_cell.base
    work = Workload(
        spec, build_method("lora", {}), n_words=2, n_word_tokens=2, shots=(1 + 9, 1 + 11),
        dev=ScoredPrompts(1, (PromptSet(4, (5, 7)),), shared=False),
        tests=ScoredPrompts(1, (PromptSet(100, (9,)), PromptSet(50, (19,))), shared=False),
    )  # fmt: skip
    memory = Memory(10**9, 10**6)
    trained = 3 * (1 + 9 + 1 + 11)
    dev = 3 * 4 * (1 + 6)
    tests = 2 * (100 * 10 + 50 * 20)  # for the last and the best on dev
    assert (work.tokens_trained, work.tokens_evaluated(False), work.tokens_evaluated(True)) == (trained, dev, dev + tests)
    search, report = (trained * (4e9 + 2e6) + 2e9 * n for n in (dev, dev + tests))
    assert flops(2, "search", work, memory) == pytest.approx(search) and flops(2, "report", work, memory) == pytest.approx(report)
    checkpointing = dataclasses.replace(
        work, spec=spec.model_copy(update={"train": spec.train.model_copy(update={"gradient_checkpointing": True})})
    )
    assert flops(2, "search", checkpointing, memory) == pytest.approx(search + trained * 2e9)

    measured = dataclasses.replace(work, tokens_measured=1000)  # by reported trials alone
    assert flops(2, "search", measured, memory) == pytest.approx(search)
    assert flops(2, "report", measured, memory) == pytest.approx(report + 2e9 * 1000)

    (state,) = Schedule([lora_cell]).states({})
    machine = Machine((Node(16, 2, None, 20 * GIB, "A10G"),))
    placements = {lora_cell.key: Placement(ResourceRequest(gpus=0.25), memory, work)}
    time = remaining_time([state], {}, placements, machine, None)
    assert time.device_s == pytest.approx((8 * search + 3 * report) / (UTILISATION * 31.2e12))
    assert time.wall_s == pytest.approx(time.device_s / 2) and (time.on_gpu, time.source) == (True, "arithmetic")
    by_harness = {lora_cell.key: Placement(ResourceRequest(gpus=0.25), memory, dataclasses.replace(work, tokens_measured=math.nan))}
    assert remaining_time([state], {}, by_harness, machine, None) is None
    unnamed = Machine((Node(16, 2, None, 20 * GIB, "GeForce-RTX-4090"),))
    assert remaining_time([state], {}, placements, unnamed, None) is None

    disk = remaining_disk([state], {}, placements)
    assert disk.weights_bytes == 3 * 4 * 10**6
    assert disk.results_bytes == 11 * (2048 + 3 * 160) + 3 * 2 * (2 * 2048 + 150 * (6 + 2 * 4))


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "vanilla"])
def test_what_forgetting_is_measured_on_is_counted(tmp_path, tiny_model, monkeypatch, method):
    """As the tokens that a real trial sends through its network once it is trained; a new head is asked nothing."""
    (tmp_path / "some.txt").write_text("the cats saw the dogs . " * 8)
    content = {
        "models": [tiny_model], "tasks": ["toy"], "methods": {method: {"n_shots": [2]}}, "report": {"seeds": [0]}, "n_dev": 4,
        "train": {"epochs": 1}, "n_test": 4, "forgetting": {"tasks": ["toy", "toy_text"], "text": f"{tmp_path}/some.txt", "limit": 12},
    }  # fmt: skip
    (cell,) = build_cells(parse_plan(content, "test"))
    counted = largest_workload([cell]).tokens_measured
    read = []

    def forward(self, compute, *arguments):
        if not arguments:  # the length of a learned prompt
            return real(self, compute)
        given = arguments[0]
        batch = isinstance(given, QueryBatch)
        read.append(int(given.attention_mask.sum()) - len(given) * (given.prefix.length if given.prefix else 0) if batch else len(given))
        return real(self, compute, *arguments)

    def measured(*given):
        with monkeypatch.context() as patched:
            patched.setattr(AdaptedModel, "forward", forward)
            return measure(*given)

    real = AdaptedModel.forward
    monkeypatch.setattr("llmft.trial.run.measure", measured)
    spec = cell.report_spec({}, 0)
    assert run_trial(spec, Runtime(device="cpu")).record.finished
    n_virtual = spec.settings.get("n_virtual_tokens", 0)
    n_prompts = 0 if method == "vanilla" else 12 + 12
    expected = sum(read) + n_virtual * n_prompts + (12 * load_task("toy_text").generation.max_new_tokens if n_prompts else 0)
    assert counted == pytest.approx(
        expected, rel=0.02
    )  # where the prompts of a test set begin alike, in a sample and in all of it, may differ
    assert (counted > 0) == (method != "vanilla")


def test_what_the_harness_reads_is_not_known(tiny_model):
    content = {"models": [tiny_model], "tasks": ["toy"], "methods": {"lora": {"n_shots": [2]}}, "forgetting": {"harness": ["boolq"]}}
    (cell,) = build_cells(parse_plan(content, "test"))
    assert math.isnan(largest_workload([cell]).tokens_measured)


def test_disk_is_about_what_is_written(tmp_path, tiny_model):
    """Real trials of the small plan, written by the store."""
    content = {
        "models": [tiny_model], "tasks": ["toy"], "methods": {"zero_shot": None, "lora": {"n_shots": [2]}},
        "train": {"epochs": 2}, "report": {"seeds": [0, 1]}, "n_dev": 4,
    }  # fmt: skip
    plan = parse_plan(content, "test")
    cells = build_cells(plan)
    expected = remaining_disk(Schedule(cells).states({}), {}, place(cells, LAPTOP))
    assert run_sweep(plan, cells, tmp_path, SweepOptions(serial=True)).n_finished == 3
    written = sum(file.stat().st_size for file in (tmp_path / "trials").glob("*/*"))
    assert expected.results_bytes == pytest.approx(written, rel=0.35)
    assert remaining_disk(Schedule(cells).states({}), {}, {cell.key: Placement(ResourceRequest()) for cell in cells}).weights_bytes == 0
