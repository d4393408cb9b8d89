"""The READMEs of methods and tasks: their tables are the registry's, and their examples run."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from llmft.config.spec import DataRef, TrainSpec
from llmft.data import sources
from llmft.methods._registry import METHODS, method_class
from llmft.tasks._registry import TASKS, load_task
from sweeps.display.catalogue import markdown_table, readmes
from sweeps.display.pages import field_rows, method_page
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan, parse_plan

ROOT = Path(__file__).resolve().parents[3]
METHODS_README, TASKS_README = ROOT / "llmft" / "methods" / "README.md", ROOT / "llmft" / "tasks" / "README.md"


def example(readme: Path, name: str) -> str:
    """The block that follows the mark of an example."""
    (block,) = re.findall(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", readme.read_text(), re.DOTALL)
    return block


@pytest.mark.parametrize("path", [METHODS_README, TASKS_README], ids=["methods", "tasks"])
def test_the_tables_are_those_of_the_registry(path):
    assert path.read_text() == readmes()[path], "run python -m sweeps.display.catalogue"


def test_a_cell_of_markdown_stays_one_cell():
    assert markdown_table(("a", "b"), [("x", "1 | 2\n3")]).splitlines()[-1] == "| `x` | 1 / 2<br>3 |"


def test_the_page_of_a_method_says_what_each_setting_may_be():
    rows = {name: rest for name, *rest in field_rows(method_class("lora").Settings)}
    assert rows["r"] == ["8", "whole number >= 1", "rank: the inner width of B A"]
    assert rows["lora_dropout"][1] == "number >= 0 and < 1" and rows["init"][:2] == ['"kaiming"', "one of kaiming, gaussian"]
    assert rows["targets"][:2] == ["[]", "all-linear or list"]
    assert ("learning_rate", "0.0002") in [row[:2] for row in field_rows(TrainSpec, {"learning_rate": 2e-4})]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name):
    console = Console(width=300, file=io.StringIO())
    console.print(method_page(name))
    page = console.file.getvalue()
    assert all(f"\n{field} " in page for field in method_class(name).Settings.model_fields)
    assert ("\nwarmup_ratio " in page) == method_class(name).trains


def test_the_readme_of_the_project_names_both():
    text = (ROOT / "README.md").read_text()
    for path in (METHODS_README, TASKS_README):
        assert f"]({path.relative_to(ROOT)})" in text


def test_the_plan_in_the_readme_of_the_project_is_one(tmp_path, tiny_model):
    (text,) = re.findall(r"## A plan\n\n```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "plan.yaml").write_text(text)
    plan, where = load_plan(str(tmp_path / "plan.yaml"), models=(tiny_model,))
    cells = build_cells(plan, where, resolve_data=lambda task, folder: DataRef())
    assert [cell.entry for cell in cells if cell.search] == 2 * ["vanilla"] + 2 * ["pattern"] + 2 * ["lora"] + 2 * ["lora_64"] + 2 * [
        "lora_wide"
    ]


RUN_BOTH = """
    from llmft.methods import METHODS
    from llmft.tasks import TASKS
    from sweeps.display import method_rows, task_rows
    from sweeps.cli.single_trial import TrialOptions, describe_trial, run_one

    assert "layer_norm" in METHODS and "parity" in TASKS
    print(method_rows(["layer_norm"])[0][:3], task_rows(["parity"])[0][:3])
    assignments = ["settings.biases=false", "n_dev=4", "n_test=8"]
    spec, _ = describe_trial(TrialOptions("parity", "layer_norm", n_shots=4, epochs=1, assignments=assignments))
    record = run_one(spec, "cpu")
    print(record.status, record.message, sorted(record.metrics["last"]), record.cost.n_trainable_parameters)
    import llmft
    print(llmft.__file__)
"""


def test_a_method_and_a_task_are_one_file_each(tmp_path):
    """In a copy of the package to which these two files are added, and nothing else."""
    for name in ("llmft", "sweeps", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for readme, name in ((METHODS_README, "llmft/methods/layer_norm.py"), (TASKS_README, "llmft/tasks/parity.py")):
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(example(readme, name))
    environment = {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(RUN_BOTH)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows, trial, place = done.stdout.splitlines()
    assert "Training the layer norms alone" in rows and "even, odd" in rows and place.startswith(str(tmp_path))
    status, *_, n_trained = trial.split()
    assert status == "finished" and "'parity', 'parity_other'" in trial

    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(ROOT / "llmft" / "toy" / "model")
    gains = sum(p.numel() for name, p in network.named_parameters() if "norm" in name and name.endswith("weight"))
    assert int(n_trained) == gains > 0
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - set(before) == {
        tmp_path / "llmft" / "methods" / "layer_norm.py", tmp_path / "llmft" / "tasks" / "parity.py"
    }  # fmt: skip
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_plan_with_a_task_of_ones_own(tmp_path):
    from llmft.tasks._toy_language import toy_data
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan

    (tmp_path / "data").mkdir()
    rows = toy_data()
    for name, pairs in (("train", rows.train), ("test", rows.in_domain)):
        lines = ["s1,s2,gold,source", *(f"{pair.premise},{pair.hypothesis},{pair.label},x" for pair in pairs)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "data" / "farm.jsonl").write_text('{"s1": "a cow", "s2": "a cow", "gold": 0, "source": "y"}\n')
    (tmp_path / "plan.yaml").write_text(example(TASKS_README, "plan.yaml"))
    plan, where = load_plan(str(tmp_path / "plan.yaml"))
    cells = build_cells(plan, where)
    assert {cell.base.method for cell in cells} == {"zero_shot", "in_context"} and cells[0].base.definition.labels == {
        "entailment": 0, "not_entailment": 1
    }  # fmt: skip


def test_the_plan_with_tasks_of_texts(tmp_path):
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan
    from sweeps.resources.workload import largest_workload

    (tmp_path / "data").mkdir()
    files = {
        "alpaca": [{"instruction": f"Say {i}.", "input": "", "output": "yes"} for i in range(12)],
        "pairs": [{"question": f"Who is {i}?", "hint": None, "answers": ["a doctor", "she"]} for i in range(12)],
    }
    for name, rows in files.items():
        for ending in ("", "_test"):
            (tmp_path / "data" / f"{name}{ending}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.yaml").write_text(example(TASKS_README, "texts.yaml"))
    plan, where = load_plan(str(tmp_path / "texts.yaml"))
    cells = build_cells(plan, where)
    assert [(cell.base.task, cell.base.pattern, cell.base.generation.max_new_tokens) for cell in cells[::2]] == [
        ("my_instructions", "alpaca", 16), ("my_pairs", "plain", 64)
    ]  # fmt: skip
    assert {cell.base.method for cell in cells} == {"zero_shot", "pattern"}
    assert largest_workload(cells[1:2]).completions and largest_workload(cells[3:4]).completions
    assert parse_plan(plan.model_dump(mode="json"), "copy") == plan


def shown(*arguments: str, capsys) -> str:
    from sweeps.cli.app import _run

    assert _run(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_task_is_shown_with_its_rows_and_patterns(task_data, capsys):
    text = " ".join(shown("tasks", "rte", "--data-dir", task_data, capsys=capsys).split())
    for part in ("(training pool) 2,490 1,249 1,241", "rte 277 146 131", "nyu-mll/glue rte validation", "label words 'True', 'False'"):
        assert part in text
    assert "Question: " in text
    assert "jhu-cogsci/hans" in text and "RTE (GLUE) in domain" in text


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_page_without_its_rows(name, capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    text, task = shown("tasks", name, capsys=capsys), load_task(name)
    assert all(f"pattern {pattern}" in text for pattern in task.patterns)
    assert ("Its rows are not on this machine" in text) == task.needs_data == bool(task.sources)
    assert all(source.holds for source in task.sources)
    assert ("to be had elsewhere" in text) == any(source.hub is None for source in task.sources)
    assert ("<answer>" in text) == (task.needs_data and not task.labels)


@pytest.mark.parametrize("name", ["rte", "mnli", "mnli_3way", "qqp", "cola"])
def test_a_task_needs_the_columns_that_its_page_names_and_no_others(name, task_data, monkeypatch):
    task, read = load_task(name), sources.read_rows

    def cut(path, columns=(), parts=()):
        holds = next(source.holds for source in task.sources if path.name in source.files)
        plain, values = re.sub(r"\(.*?\)", "", holds), re.findall(r"(\d) \w+", holds)
        wanted = [column.strip() for column in plain.removeprefix("without a header:").split(",")]
        rows = read(path, columns, parts)
        assert {str(row["label"]) for row in rows} <= set(values)
        return [{column: row[column] for column in wanted if not column.startswith("the ")} for row in rows]

    monkeypatch.setattr(sources, "read_rows", cut)
    assert len(task.load(DataRef(directory=task_data)).pool) > 100


def test_a_task_whose_rows_are_elsewhere_is_shown_without_them(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    text = shown("tasks", "qqp", capsys=capsys)
    assert "Its rows are not on this machine" in text and "<question1> <question2> ? No" in text and "sha256" in text
    text = shown("tasks", "toy", capsys=capsys)
    assert "(training pool) 1,200" in " ".join(text.split())
    assert shown("tasks", "--markdown", capsys=capsys).strip() in TASKS_README.read_text()
    assert shown("methods", "--markdown", capsys=capsys).strip() in METHODS_README.read_text()
