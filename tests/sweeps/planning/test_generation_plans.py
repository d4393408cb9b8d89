"""Plans whose tasks generate text: cells, estimates, a whole sweep, and what is shown of it."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow.compute as pc
import pytest
from rich.console import Console
from support.fakes import fake_data, fake_model
from support.memory import estimate_of, one_thread, peak_of_trial, tiny_flan  # noqa: F401 - fixtures

from analysis.frames.loading import load
from analysis.frames.predictions import open_predictions
from analysis.report.build import write_report
from analysis.report.verdict import write_verdicts
from analysis.tables.comparison import compare
from analysis.tables.render import to_terminal
from llmft.config.spec import GenerationSpec
from llmft.errors import UserError
from llmft.trial.preparation import encode_prompts, prepare_trial
from sweeps.cli.single_trial import TrialOptions, describe_trial, run_one
from sweeps.display.record_page import record_summary
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.resources.workload import largest_workload
from sweeps.run import SweepOptions, run_sweep

SETTINGS = {"sequence_distillation": {"n_unlabelled": 24, "keep_unfinished": True}}


def plan_of(model="fake", **changes):
    content = {
        "models": [model], "tasks": ["toy_text"], "methods": {"pattern": {}}, "report": {"seeds": [0, 1]}, "n_dev": 4, "n_test": 8,
        "n_shots": [4], "train": {"epochs": 1, "batch_size": 4},
    }  # fmt: skip
    return parse_plan(content | changes, "test.yaml")


def cells_of(**changes):
    return build_cells(plan_of(**changes), "test.yaml", fake_model, fake_data)


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_the_tasks_defaults_come_before_those_of_all_tasks_and_the_plans_before_both():
    tasks = ["toy", "toy_text", "narrative_qa"]
    by_task = {cell.base.task: cell.base.generation for cell in cells_of(tasks=tasks)}
    assert by_task == {"toy": None, "toy_text": GenerationSpec(max_new_tokens=8), "narrative_qa": GenerationSpec(max_new_tokens=32)}
    given = {"max_new_tokens": 5, "stop": ["\n", "."]}
    by_task = {cell.base.task: cell.base.generation for cell in cells_of(tasks=tasks, generation=given)}
    assert by_task["toy"] is None
    assert by_task["toy_text"] == by_task["narrative_qa"] == GenerationSpec(max_new_tokens=5, stop=("\n", "."))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"generation": {"max_tokens": 5}}, "test.yaml: generation: unknown key 'max_tokens'. Did you mean 'max_new_tokens'?"),
     ({"generation": {"temperature": -1}}, "test.yaml: generation: temperature:"),
     ({"generation": {"top_p": 0.5}}, "test.yaml: generation: top_p and top_k need a temperature"),
     ({"generation": {"num_beams": 2}, "tasks": ["toy"]}, "test.yaml: generation: none of the tasks toy generates text"),
     ({"methods": {"vanilla": {}}}, "test.yaml: methods.vanilla: method 'vanilla' is for classification, and the task 'toy_text'")],
)  # fmt: skip
def test_a_mistake_is_named(changes, said):
    with pytest.raises(UserError) as raised:
        cells_of(**changes)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("generation", "n_seeds"), [({}, 1), ({"temperature": 1.0}, 2)])
def test_zero_shot_is_reported_with_every_seed_where_it_draws(generation, n_seeds):
    (cell,) = cells_of(methods={"zero_shot": {}}, generation=generation)
    assert len(cell.report_seeds) == n_seeds


def test_a_workload_is_what_the_heaviest_draw_takes(tiny_model):
    (cell,) = build_cells(plan_of(tiny_model, report={"seeds": [0]}), "test.yaml")
    work, spec = largest_workload([cell]), cell.report_spec({}, 0)
    encoded = encode_prompts(spec, prepare_trial(spec))
    shots = encoded.sets["shots"]
    whole = sorted((len(s) + len(c) - 1, len(c)) for s, c in zip(shots.suffixes, shots.completions, strict=True))
    assert list(zip(work.shots, work.completions, strict=True)) == whole
    n_queries, n_tokens = 4 + 2 * 8 * 2, 0  # dev once; two sets under two checkpoint rules
    for name, times in (("dev", 1), ("toy_text", 2), ("toy_text_hans", 2)):
        n_tokens += times * sum(map(len, encoded.sets[name].suffixes))
    assert work.tokens_evaluated(with_tests=True) == n_tokens + n_queries * (len(encoded.prefix) + 8)


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, model) for method in ("zero_shot", "in_context", "pattern") for model in ("tiny_model", "tiny_flan")]
    + [("sequence_distillation", "tiny_flan")],  # what the other says is no UTF-8, and takes more tokens when it is read again
)
def test_an_estimate_is_within_30_percent_of_a_real_trial(request, method, model):
    plan = plan_of(
        request.getfixturevalue(model), methods={method: {"settings": SETTINGS.get(method, {})}}, n_test=24, n_shots=[16],
        train={"epochs": 2, "batch_size": 16},
        generation={"max_new_tokens": 30, "stop": []}, test_sets=["toy_text"], report={"seeds": [0]},
    )  # fmt: skip
    (cell,) = build_cells(plan, "test.yaml")
    estimated = estimate_of([cell], on_gpu=False)
    peak = max(peak_of_trial(cell.report_spec({}, seed))[0] for seed in cell.report_seeds)
    beside_base = estimated.cpu_bytes - estimated.base_bytes
    assert peak <= 1.3 * beside_base and beside_base <= 1.3 * peak + estimated.checkpoint_bytes  # not there where the last epoch is best


def test_a_sweep_over_both_kinds_of_task_can_be_analysed(tmp_path, tiny_model):
    plan = plan_of(tiny_model, tasks=["toy", "toy_text"], methods={"zero_shot": {}, "lora": {}}, generation={"max_new_tokens": 3})
    outcome = run_sweep(plan, build_cells(plan, "test.yaml"), tmp_path, SweepOptions(serial=True))
    assert (outcome.n_finished, outcome.n_failed) == (2 * (1 + 2), 0)
    frame = load(tmp_path)
    of_text = frame[frame["task"] == "toy_text"]
    assert set(frame["metric"]) == {"accuracy", "rougeL"} and set(of_text["metric"]) == {"rougeL"}
    assert of_text["in_domain_accuracy"].isna().all() and (of_text["in_domain_score"] == of_text["toy_text_rougeL"]).all()
    for metric in ("rouge1", "rouge2", "rougeLsum", "bleu", "exact_match", "token_f1"):
        assert of_text[f"toy_text_{metric}"].between(0, 1).all() and frame[f"toy_{metric}"].isna().all()
    table = compare(frame)
    assert set(table.loc[table["method"] == "majority_class", "task"]) == {"toy"}
    answers = {answer.task: answer.in_domain for answer in write_verdicts(frame)}
    assert "majority" not in answers["toy_text"]
    assert "toy_text" in text(to_terminal(table)) and write_report(tmp_path).is_file()

    for task, column in (("toy", "label"), ("toy_text", "text")):  # whichever file comes first
        of_task = list(frame.loc[frame["task"] == task, "digest"].unique())
        rows = open_predictions(tmp_path).to_table(filter=pc.field("digest").isin(of_task))
        assert len(rows) > 0 and rows[column].null_count == 0


def test_one_trial_from_the_command_line_shows_its_own_metric(tiny_model):
    assignments = ["n_dev=4", "n_test=4", "generation.max_new_tokens=3", "generation.stop=['.']", "settings.r=2"]
    options = TrialOptions("toy_text", "lora", str(tiny_model), n_shots=4, epochs=1, assignments=assignments)
    record = run_one(describe_trial(options)[0], "cpu")
    assert record.spec.generation == GenerationSpec(max_new_tokens=3, stop=(".",)) and record.spec.settings["r"] == 2
    shown = text(record_summary(record))
    assert "rougeL %" in shown and "BLEU %" in shown and "majority" not in shown and "nan" not in shown
    with pytest.raises(UserError, match="generation: none of the tasks toy generates text"):
        describe_trial(replace(options, task="toy"))
