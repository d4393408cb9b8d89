"""The command that the report gives for a trial describes that very trial."""

from __future__ import annotations

import shlex

import pytest
import typer

from analysis.frames.reproduce import trial_command
from llmft.config.spec import TrialSpec
from llmft.methods._registry import METHODS, method_class
from sweeps.cli import app as cli
from sweeps.cli import single_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan

CHANGES = [
    {},
    {"n_shots": [2], "shots_unit": "per_class", "n_dev": 32, "n_test": 50, "max_length": 200, "precision": "bf16"},
    {"report": {"seeds": [7, 8, 9], "vary": ["data"]}},
    {"report": {"seeds": [7, 8, 9], "vary": ["order", "dropout"]}},
    {"draw": "random", "instruction": 'Is it so? It\'s {not} "easy".'},
    {"selections": ["last", "best_in_domain"], "test_sets": ["toy_hans"]},
    {"train": {"learning_rate": 3e-5, "epochs": 7, "batch_size": 4, "schedule": "cosine", "clip_norm": None, "dropout": 0.0}},
    {"train": {"patience": 3, "layer_decay": 0.5}},
    {"train": {"warmup_ratio": 0.1, "weight_decay": 0.0, "schedule": "constant", "clip_norm": 1.0}},  # some methods have others
]


def spec_of(command: str, monkeypatch) -> TrialSpec:
    """The trial that the command line would run."""
    seen = []

    def catch(spec, *_, **__):
        seen.append(spec)
        raise typer.Abort

    monkeypatch.setattr(single_trial, "run_one", catch)
    program, *arguments = shlex.split(command)
    assert program == "llmft" and cli._run(arguments) == cli.STOPPED
    return seen[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, CHANGES[0]) for name in METHODS] + [(name, change) for change in CHANGES[1:] for name in ("in_context", "lora", "qlora")],
)
def test_the_command_describes_the_trial(name, change, monkeypatch):
    train, entry = change.get("train", {}), {"mixture": ["toy_text"]} if name == "multi_task" else {}
    task = "toy" if "classification" in method_class(name).kinds else "toy_text"
    plan = parse_plan({"models": ["toy"], "tasks": [task], "methods": {name: entry}, **change, "train": train}, "plan")
    (cell,) = build_cells(plan)
    spec = cell.report_spec({}, 3)
    assert spec_of(trial_command(spec), monkeypatch).digest == spec.digest


def test_settings_and_odd_names_are_quoted(monkeypatch):
    methods = {"lora": {"settings": {"r": 4, "alpha": 2}}}
    (cell,) = build_cells(parse_plan({"models": ["toy"], "tasks": ["toy"], "methods": methods, "n_shots": [16]}, "plan"))
    spec = cell.report_spec({}, 0)
    assert spec_of(trial_command(spec), monkeypatch).settings == spec.settings
    odd = spec.model_copy(update={"model": spec.model.model_copy(update={"name": "a b; rm -rf '$HOME'"})})
    assert shlex.split(trial_command(odd))[7] == "a b; rm -rf '$HOME'"


def test_what_the_command_line_cannot_say_has_no_command():
    spec = TrialSpec(model={"name": "toy"}, task="toy", method="lora")
    assert trial_command(spec.model_copy(update={"test_sets": ()})) is None
    assert trial_command(spec.model_copy(update={"order_seed": 1, "init_seed": 2})) is None


def test_a_teacher_is_named(monkeypatch):
    methods = {"context_distillation": {"teacher": "toy", "n_shots": [16]}}
    (cell,) = build_cells(parse_plan({"models": ["toy"], "tasks": ["toy"], "methods": methods}, "plan"))
    spec = cell.report_spec({}, 1)
    command = trial_command(spec)
    assert (spec.teacher is None or """--set 'teacher.name="toy"'""" in command) and spec_of(command, monkeypatch).digest == spec.digest


def test_a_held_out_task_and_what_was_mixed_are_said(monkeypatch):
    methods = {"multi_task": {"mixture": ["toy_text"], "n_shots": [0]}}
    (cell,) = build_cells(parse_plan({"models": ["toy"], "tasks": ["toy"], "methods": methods}, "plan"))
    spec = cell.report_spec({}, 1)
    assert "--shots 0 " in trial_command(spec) and """--set 'mixture=["toy_text"]'""" in trial_command(spec)
    assert spec_of(trial_command(spec), monkeypatch).digest == spec.digest


def test_how_text_is_generated_is_said(monkeypatch):
    content = {"models": ["toy"], "tasks": ["toy_text"], "methods": {"lora": {}}, "generation": {"max_new_tokens": 3, "stop": ["."]}}
    (cell,) = build_cells(parse_plan(content, "plan"))
    spec = cell.report_spec({}, 1)
    assert spec_of(trial_command(spec), monkeypatch).digest == spec.digest
