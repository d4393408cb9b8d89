import re

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmft.errors import UserError
from sweeps.cli.app import _run
from sweeps.cli.export_trial import export_trial
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import parse_plan
from sweeps.run import SweepOptions, run_sweep


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """A sweep that kept the weights of its reported trials: a search, and two of its report."""
    content = {
        "models": [tiny_model], "tasks": ["toy"], "methods": {"lora": {"settings": {"r": 2}}, "zero_shot": {}}, "n_shots": [4],
        "n_dev": 4, "n_test": 4, "train": {"epochs": 1, "batch_size": 4}, "search": {"n_trials": 1, "seeds": [9]},
        "report": {"seeds": [0, 1]}, "keep_weights": True,
    }  # fmt: skip
    root = tmp_path_factory.mktemp("results") / "kept"
    plan = parse_plan(content, "test")
    assert run_sweep(plan, build_cells(plan, "test"), root, SweepOptions(serial=True)).n_failed == 0
    return root


def digests(results, name: str) -> list[str]:
    """The trials that have a file of this name."""
    return sorted(path.parent.name for path in (results / "trials").glob(f"*/{name}"))


def test_a_kept_trial_is_written_for_peft_and_for_transformers(results, tiny_model, tmp_path, capsys):
    first, second = digests(results, "weights.safetensors")  # the reported ones of lora alone
    assert _run(["export", str(results), first, str(tmp_path / "adapter")]) == 0
    assert "adapter: peft.PeftModel" in capsys.readouterr().out
    assert _run(["export", str(results), second[:8], str(tmp_path / "model"), "--merge"]) == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tiny_model) and adapted.peft_config["default"].r == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_what_is_not_there_is_said(results, tmp_path, capsys):
    without = next(iter(set(digests(results, "record.json")) - set(digests(results, "weights.safetensors"))))
    with pytest.raises(UserError, match="kept no weights. Run its plan with keep_weights: true"):
        export_trial(results, without, tmp_path / "new", merge=False)
    for beginning, said in (
        ("zzz", "no trial begins with 'zzz'. The digests are the names of the folders in .*/trials.$"),
        (without[:-1] + "!", f"no trial begins with .* Nearest: {without}"),
        ("", "trials begin with ''; write more of the digest. Nearest: .*, ..."),
    ):
        with pytest.raises(UserError, match=said):
            export_trial(results, beginning, tmp_path / "new", merge=False)
        assert _run(["evaluate", str(results), beginning, "--tasks", "toy"]) == 2
        assert re.search(said, capsys.readouterr().err.strip())


def test_one_trial_keeps_its_weights_where_it_is_asked_to(tiny_model, tmp_path):
    sets = [text for key in ("n_test=4", "n_dev=4") for text in ("--set", key)]
    trial = ["trial", "--task", "toy", "--method", "ia3", "--model", tiny_model, "--shots", "4", "--epochs", "1", *sets]
    assert _run([*trial, "--set", "keep_weights=true"]) == 2
    assert _run([*trial, "--set", "keep_weights=true", "--out", str(tmp_path / "out")]) == 0
    assert _run(["export", str(tmp_path / "out"), "", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
