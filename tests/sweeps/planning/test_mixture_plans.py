"""A plan that trains on mixtures of tasks: what is held out, what counts for the digest, and what is refused."""

from __future__ import annotations

import pytest
from support.fakes import fake_data, fake_model

from llmft.config.spec import DataRef
from llmft.errors import UserError
from llmft.methods._registry import build_method
from llmft.trial.mixture import shares
from sweeps.execution.prefetch import Needs
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan, parse_plan


def cells_of(mixture, *, data=fake_data, tasks=("rte", "cola"), method="multi_task", **entry):
    methods = {"mixed": {"method": method, "mixture": mixture, **entry}}
    plan = parse_plan({"models": ["fake"], "tasks": list(tasks), "methods": methods}, "plan.yaml")
    return build_cells(plan, "plan.yaml", fake_model, data)


def test_each_task_is_held_out_of_its_own_mixture():
    cells = cells_of(["rte", "cola", "qqp"], n_shots=[0, 16])
    mixed = [(cell.base.task, cell.base.n_shots, sorted(cell.base.mixture)) for cell in cells]
    rte, cola = ["cola", "qqp"], ["qqp", "rte"]
    assert mixed == [("rte", 0, rte), ("rte", 16, rte), ("cola", 0, cola), ("cola", 16, cola)]
    assert all(len(cell.report_seeds) == 6 for cell in cells)


def test_a_mixed_tasks_rows_count_for_the_digest_and_are_fetched():
    def other_rows(task: str, directory: str | None) -> DataRef:
        return DataRef(fingerprint="other", commits=(("a", "b", "c"),)) if task == "qqp" else fake_data(task, directory)

    first, second = cells_of(["qqp"]), cells_of(["qqp"], data=other_rows)
    assert not {cell.key for cell in first} & {cell.key for cell in second}
    assert [task for task, *_ in Needs.of(second).data] == ["qqp"]


@pytest.mark.parametrize(
    ("mixture", "changed", "said"),
    [
        (["qpq"], {}, "methods.mixed.mixture: .*'qpq'.* Did you mean 'qqp'"),
        (["qqp", "qqp"], {}, "methods.mixed.mixture: names 'qqp' twice"),
        (["rte"], {}, "methods.mixed.mixture: name tasks to train on, besides 'rte' itself"),
        ([], {}, "methods.mixed.mixture: name tasks to train on"),
        (["qqp"], {"method": "pattern"}, "methods.mixed.mixture: the method 'pattern' trains on its own task alone"),
        (["qqp"], {"method": "pattern", "mixture": [], "n_shots": [0]}, "n_shots: must be at least 1"),
    ],
)
def test_what_is_no_mixture_is_refused(mixture, changed, said):
    with pytest.raises(UserError, match=said):
        cells_of(changed.pop("mixture", mixture), **changed)


POOLS = {"rte": 2490, "mnli": 392_702, "qqp": 1000, "cola": 8551}
"""Rows of the training pools on the hub, those of qqp after its cut."""


def test_the_plan_that_comes_with_llmft_asks_no_task_for_more_than_it_has():
    plan, _ = load_plan("multi_task")
    mixed = {name: build_method("multi_task", entry.settings) for name, entry in plan.methods.items() if entry.mixture}
    assert sorted(mixed) == ["lora_mixture", "more_alike", "multi_task"]
    for method in mixed.values():
        for held_out in plan.task_names:
            pools = {name: n for name, n in POOLS.items() if name != held_out}
            counts = dict(zip(pools, shares(list(method.rates(pools).values()), method.settings.n_examples), strict=True))
            assert all(0 < n <= pools[name] for name, n in counts.items()), (method, held_out, counts)
