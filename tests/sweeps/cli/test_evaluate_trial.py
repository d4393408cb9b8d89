from __future__ import annotations

import json

import pytest

from analysis.tables.forgetting import load_forgetting
from llmft.records.record_files import EVALUATION_FILE, read_evaluation
from sweeps.planning.loader import load_plan

PLAN = (
    ("n_shots: [2, 4]", "n_shots: [2]"),
    ("search: {n_trials: 4, seeds: [100, 101], round_size: 2}\n", ""),
    ("report: {seeds: [0, 1, 2]}", "report: {seeds: [0]}\nkeep_weights: true"),
    ("lora: {search: {r: {choices: [2, 4]}}}", "lora:\n  vanilla:"),
)


@pytest.fixture
def call(capsys):
    from sweeps.cli.app import _run

    def run(*arguments):
        code = _run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def digests(results) -> dict[str, str]:
    records = [json.loads(file.read_text()) for file in results.glob("trials/*/record.json")]
    return {record["spec"]["method"]: record["digest"] for record in records}


def test_a_sweep_measures_forgetting_and_evaluate_measures_more(tmp_path, plan_file, tiny_model, call):
    (tmp_path / "text.txt").write_text("the cats saw the dogs . " * 40)
    asked = f"forgetting: {{tasks: [toy], text: {tmp_path}/text.txt, limit: 10}}\nn_test: 8"
    results = tmp_path / "results"
    code, shown, err = call("sweep", plan_file(*PLAN, ("n_test: 8", asked), model=tiny_model), "--out", results, "--serial")
    assert code == 0, err
    of = digests(results)
    frame = load_forgetting(results)
    assert {*frame["method"]} == {"zero_shot", "in_context", "lora"}  # the head of vanilla can be asked nothing
    assert (frame["n"][frame["source"] == "llmft"] == 10).all() and frame["before"].notna().all()
    before = frame[frame["method"] == "zero_shot"].set_index("metric")["after"]

    code, shown, err = call("evaluate", results, of["lora"][:8], "--tasks", "toy", "--limit", 6, "--before")
    assert code == 0 and "toy" in shown and "accuracy" in shown, err
    code, shown, err = call("evaluate", results, of["lora"], "--text", tmp_path / "text.txt", "--json")
    evaluation = read_evaluation(results / "trials" / of["lora"])
    assert json.loads(shown) == json.loads(evaluation.model_dump_json())
    assert len(evaluation.changes) == 5 and [c.before is None for c in evaluation.changes] == [False] + [True] * 4
    in_sweep = frame[(frame["method"] == "lora")].set_index("metric")["after"]
    later = {change.after.metric: change.after.value for change in evaluation.changes}
    assert later["word_perplexity"] == pytest.approx(in_sweep["word_perplexity"], rel=1e-5)
    assert later["word_perplexity"] != pytest.approx(before["word_perplexity"], rel=1e-6)
    code, shown, err = call("evaluate", results, of["zero_shot"], "--text", tmp_path / "text.txt", "--json")
    assert json.loads(shown)["changes"][0]["after"]["value"] == pytest.approx(before["token_perplexity"])
    assert set(load_forgetting(results)["measured"]) == {"trial", "later"}

    code, _, err = call("evaluate", results, of["vanilla"], "--tasks", "toy")
    assert code == 2 and "'vanilla' answers with a head of its own" in err
    for arguments, said in (
        ([of["lora"]], "nothing to measure"),
        (["nowhere", "--tasks", "toy"], "no trial begins with 'nowhere'"),
        (["", "--tasks", "toy"], "4 trials begin with"),
        ([of["lora"], "--text", "nofile.txt"], "nofile.txt cannot be read (No such file or directory)"),
        ([of["lora"], "--tasks", "tay"], "Did you mean 'toy'"),
    ):
        code, _, err = call("evaluate", results, *arguments)
        assert code == 2 and said in err and err.count("\n") == 1

    (results / "trials" / of["lora"] / "weights.safetensors").write_bytes(b"torn")
    code, _, err = call("evaluate", results, of["lora"], "--tasks", "toy")
    assert code == 2 and "checksum" in err


def test_without_kept_weights_it_says_how_to_keep_them(tmp_path, plan_file, tiny_model, call):
    changes = ("report: {seeds: [0, 1, 2]}", "report: {seeds: [0]}"), ("lora: {search: {r: {choices: [2, 4]}}}", "lora:")
    path = plan_file(*PLAN[:2], *changes, model=tiny_model)
    assert call("sweep", path, "--out", tmp_path / "r", "--serial")[0] == 0
    digest = digests(tmp_path / "r")["lora"]
    code, _, err = call("evaluate", tmp_path / "r", digest, "--tasks", "toy")
    assert code == 2 and "Put keep_weights: true into the plan" in err
    assert not (tmp_path / "r" / "trials" / digest / EVALUATION_FILE).exists()


def test_the_plan_says_what_is_measured_and_the_search_measures_nothing(small_cells, plan_file, tmp_path):
    from llmft.errors import UserError

    _, cells = small_cells(("n_test: 8", "n_test: 8\nforgetting: {tasks: [toy]}"))
    for cell in cells:
        assert list(cell.base.forgetting.tasks) == ["toy"] and cell.search_base.forgetting is None
    several = ("models: [fake]", "models: [{name: fake, gpus: 2}]\nforgetting: {tasks: [toy]}")
    with pytest.raises(UserError, match="forgetting is measured by one process"):
        load_plan(str(plan_file(several)))
    with pytest.raises(UserError, match=r"unknown key 'forgetting.task'. Did you mean 'tasks'"):
        load_plan(str(plan_file(("n_test: 8", "n_test: 8\nforgetting: {task: [toy]}"))))
