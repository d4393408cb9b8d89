"""A plan that trains on mixtures of tasks: what is held out, what counts for the digest, and what is refused."""

from __future__ import annotations

import pytest
from fakes import fake_data, fake_model

from llmft.errors import UserError
from llmft.spec import DataRef
from sweeps.cells import build_cells
from sweeps.plan import parse_plan
from sweeps.prefetch import Needs


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
