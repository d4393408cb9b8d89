"""A plan with a task of the user's own: paths, errors, and that an unchanged file is an unchanged result."""

from __future__ import annotations

import json
import shutil

import pytest
from support.fakes import fake_model

from llmft.errors import UserError
from llmft.tasks._toy_language import toy_data
from sweeps.execution.prefetch import Needs
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan, parse_plan

TASK = """
  - name: mine
    train: data/train.csv
    test: {in_domain: data/test.csv, out_of_domain: {other: {file: data/other.jsonl}}}
    columns: {premise: s1, hypothesis: s2}
    label: gold
    labels: {entailment: 0, not_entailment: 1}
    groups: [case]
    patterns: {minimal: "{premise} {hypothesis} ?"}
    verbalizers: {yes-no: [Yes, No]}
"""


@pytest.fixture
def own_plan(plan_file, tmp_path):
    """Writes the plan, and beside it the toy task as files; `changes` replace text of the plan."""
    rows = toy_data()
    (tmp_path / "data").mkdir()
    for name, pairs in (("train", rows.train), ("test", rows.in_domain)):
        lines = ["s1,s2,gold,case", *(f"{pair.premise},{pair.hypothesis},{pair.label},{pair.subcase}" for pair in pairs)]
        (tmp_path / "data" / f"{name}.csv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    other = [{"s1": pair.premise, "s2": pair.hypothesis, "gold": pair.label, "case": pair.subcase} for pair in rows.out_of_domain]
    (tmp_path / "data" / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))

    def write(*changes: tuple[str, str], model: str = "fake"):
        return plan_file(("tasks: [toy]\n", f"tasks:{TASK}"), *changes, model=model)

    return write


def cells_of(path):
    plan, where = load_plan(str(path))
    return plan, build_cells(plan, where, fake_model)


def test_paths_count_from_the_plans_folder_and_the_files_from_their_content(own_plan, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    plan, cells = cells_of(own_plan())
    assert {cell.base.task for cell in cells} == {"mine"} and cells[0].base.definition.train.file == str(tmp_path / "data" / "train.csv")
    assert parse_plan(plan.model_dump(mode="json"), "copy") == plan  # so results/NAME/plan.yaml runs from anywhere
    assert not Needs.of(cells).data
    shutil.copytree(tmp_path, tmp_path / "copy")
    _, moved = cells_of(tmp_path / "copy" / "plan.yaml")
    assert [cell.key for cell in moved] == [cell.key for cell in cells]
    with (tmp_path / "copy" / "data" / "other.jsonl").open("a") as file:
        file.write('{"s1": "a", "s2": "b", "gold": 0, "case": ""}\n')
    _, longer = cells_of(tmp_path / "copy" / "plan.yaml")
    assert not {cell.key for cell in longer} & {cell.key for cell in cells}


def test_the_same_rows_give_the_same_numbers_as_the_task_in_python(own_plan, tiny_model):
    from llmft.runtime import Runtime
    from llmft.tasks._registry import load_task
    from llmft.trial.run import run_trial

    plan, where = load_plan(str(own_plan(model=tiny_model)))
    spec = next(cell for cell in build_cells(plan, where) if cell.entry == "zero_shot").report_spec({}, 0)
    spec = spec.model_copy(update={"n_test": None, "n_dev": 0})
    other = spec.model_copy(update={"task": "toy", "definition": None, "data": load_task("toy").resolve_data(None)})
    mine, theirs = (run_trial(each, Runtime(device="cpu")).record.metrics["none"] for each in (spec, other))
    for own_name, name in (("mine", "toy"), ("other", "toy_hans")):
        assert mine[own_name].label_accuracy == theirs[name].label_accuracy and mine[own_name].loss == pytest.approx(theirs[name].loss)
    assert mine["other"].group_accuracy["case"] == theirs["toy_hans"].group_accuracy["subcase"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("data/train.csv", "data/trian.csv", ["plan.yaml: tasks.mine: ", "data/trian.csv: there is no such file"]),
     ("label: gold", "label: golden", ["plan.yaml: tasks.mine: ", "data/train.csv: there is no column 'golden' in the header"]),
     ("not_entailment: 1", "not_entailment: 2", ["plan.yaml: tasks.mine: ", "label '1' in column 'gold' is not one of 0, 2"]),
     ("{premise} {hypothesis} ?", "{premise} {hypo} ?", ["plan.yaml: tasks.0: patterns.minimal: {hypo} is no field of the task"]),
     ("    label: gold", "    lable: gold", ["unknown key 'tasks.0.lable'. Did you mean 'label'?"]),
     ("{file: data", "{flie: data", ["unknown key 'tasks.0.test.out_of_domain.other.flie'. Did you mean 'file'?"]),
     ("name: mine", "name: toy", ["tasks: 'toy' is the name of a task that comes with llmft"]),
     ("[Yes, No]", "[True, False]", ["plan.yaml: tasks.0.verbalizers: yes-no: true and false are no words in YAML"]),
     ("[Yes, No]", "[Yes]", ["plan.yaml: tasks.0: verbalizers.yes-no: 1 words for 2 labels"]),
     ("n_dev: 4", "n_dev: 4\npattern: maximal", ["unknown pattern 'maximal'", "minimal"])],
)  # fmt: skip
def test_a_mistake_is_one_line_with_plan_and_key(own_plan, tiny_model, old, new, said):
    from sweeps.run import check_cells

    with pytest.raises(UserError) as raised:
        plan, where = load_plan(str(own_plan((old, new), model=tiny_model)))
        check_cells(build_cells(plan, where), where)
    text = str(raised.value)
    assert "\n" not in text and all(part in text for part in said), text
