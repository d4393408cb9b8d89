"""The command line as a person meets it: in a process of its own."""

import io
import json
import subprocess
import sys
import time

import pytest

TRIAL = "trial --task toy --shots 4 --epochs 4 --set n_test=8 --set n_dev=4 --method".split()


def llmft(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "sweeps.cli", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def imported_by(*arguments) -> str:
    """Run a command in a process of its own; returns its exit code and which large packages it imported."""
    code = """if True:
        import sys
        from sweeps.cli.app import _run
        code = _run(sys.argv[1:])
        print(code, sorted({"torch", "ray", "optuna", "pandas"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def test_help_comes_at_once_and_imports_nothing_heavy():
    code = "import sys, sweeps.cli; print(sorted({'torch', 'ray', 'pydantic', 'numpy', 'optuna', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    for arguments in (
        ["methods"],
        ["tasks", "toy"],
        ["sweep", "quickstrat"],
        ["trial", "--task", "toy", "--method", "lora", "--set", "x=1"],
    ):
        assert imported_by(*arguments).split(maxsplit=1)[1] == "[]", arguments
    started = time.perf_counter()
    shown = llmft("--help")
    assert shown.returncode == 0 and time.perf_counter() - started < 2
    for command in ("sweep", "plan", "fetch", "trial", "report", "export", "methods", "tasks"):
        assert command in shown.stdout and llmft(command, "--help").returncode == 0


def test_version_methods_and_tasks():
    from llmft import __version__
    from llmft.methods._registry import METHODS
    from llmft.tasks._registry import TASKS

    assert llmft("--version").stdout.strip() == f"llmft {__version__}"
    shown = llmft("methods").stdout
    assert all(f"\n{name} " in shown for name in METHODS)
    shown = llmft("tasks").stdout
    assert all(f"\n{name} " in shown for name in TASKS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "quickstrat"], "Did you mean 'quickstart'"),
        (["sweep", "none.yaml"], "none.yaml: there is no such file"),
        (["swep"], "No such command"),
        (["sweep"], "PLAN"),
        (["sweep", "quickstart", "--workers", "0"], "'--workers': must be greater than or equal to 1. See llmft sweep --help."),
        (["sweep", "quickstart", "--serial", "--workers", "2"], "--serial runs without Ray"),
        (["sweep", "quickstart", "--track", "mlfow"], "--track: unknown tracker 'mlfow'. Did you mean 'mlflow'"),
        (["sweep", "quickstart", "--model", "./nowhere"], "quickstart.yaml: model: there is no folder"),
        (["sweep", "quickstart", "--address", "127.0.0.1:1"], "--address: nothing answers at 127.0.0.1:1"),
        (["sweep", "quickstart", "--gpus-per-trial", "1.5"], "--gpus-per-trial: a share of one GPU, or a whole number"),
        (["trial", "--task", "toy", "--method", "lara"], "Did you mean 'lora'"),
        (
            ["trial", "--task", "toy", "--method", "lora", "--set", "settings.rank=3"],
            "--set, method 'lora': unknown key 'settings.rank'. Did you mean",
        ),
        (["trial", "--task", "toy", "--method", "lora", "--set", "r=3"], "--set, method 'lora': unknown key 'r'. Allowed: settings.r."),
        (["trial", "--task", "toy", "--method", "lora", "--set", "n_tests=3"], "unknown key 'n_tests'. Did you mean 'n_test'?"),
        (["trial", "--task", "toy", "--method", "lora", "--set", "settings.r=0"], "trial: methods.lora: "),
        (["trial", "--task", "toy", "--method", "lora", "--set", "keep_weights=true"], "keep_weights needs a folder"),
        (["trial", "--task", "toy", "--method", "lora", "--set", "n_dev=2", "--set", "n_dev.x=2"], "unknown key 'n_dev.x'"),
        (["trial", "--task", "toy"], "trial: name --task and --method, or a plan or record with --spec."),
        (["trial", "--spec", "quickstart"], "quickstart: has several cells; choose --method from zero_shot, "),
        (["trial", "--spec", "quickstart", "--method", "lara"], "quickstart: unknown method 'lara'. Did you mean 'lora'?"),
        (["trial", "--spec", "nowhere.json"], "nowhere.json: cannot be read"),
        (["trial", "--spec", "nowhere.json", "--lr", "1e-3"], "nowhere.json describes the whole trial; leave out all options but"),
        (["trial", "--task", "toy", "--method", "lora", "--set", "r"], "write key=value"),
        (["trial", "--task", "toy", "--method", "zero_shot", "--device", "gpu"], "--device: there is no device 'gpu' here"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "nowhere", "mosbach2023"], "nowhere: no such folder"),
        (["compare", "mosbach2023", "mosbach"], "mosbach: no such folder. Did you mean 'mosbach2023'?"),
        (["methods", "lara"], "Did you mean 'lora'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path):
    shown = llmft(*arguments, cwd=tmp_path)
    assert shown.returncode == 2 and shown.stderr.startswith("llmft: ") and shown.stderr.count("\n") == 1 and said in shown.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def llmft_here(capsys):
    """The command line in this process, which has imported torch already: gives the exit code and what was printed."""
    from sweeps.cli.app import _run

    def run(*arguments):
        code = _run([str(argument) for argument in arguments])
        return code, capsys.readouterr().out

    return run


def test_plan_then_sweep_then_plan_then_report(tmp_path, plan_file, tiny_model, llmft_here):
    path = plan_file(("n_shots: [2, 4]", "n_shots: [2]"), ("n_trials: 4", "n_trials: 1"), model=tiny_model)
    out = tmp_path / "results"
    code, shown = llmft_here("plan", path, "--out", out)
    assert code == 0 and "search: 2 trials, 2 new" in shown and "report: 7 trials, 7 new" in shown
    assert "unknown until the first trials end" in shown and "records of other plans" not in shown and not out.exists()
    lora = next(line.split() for line in shown.splitlines() if line.split()[2:5] == ["lora", "1", "CPU"])
    assert float(lora[5]) > 1 and lora[6] in ("KiB", "MiB")
    code, shown = llmft_here("sweep", path, "--out", out, "--serial")
    assert code == 0 and "9 trials finished, 0 failed; 9 ran now" in shown
    assert "zero_shot" in shown and (out / "report" / "report.html").exists() and (out / "plan.yaml").exists()
    code, shown = llmft_here("plan", path, "--out", out)
    assert "search: 2 trials, 0 new, 2 done, 0 failed" in shown and "time: about 0 s" in shown
    code, shown = llmft_here("plan", plan_file(("n_shots: [2, 4]", "n_shots: [4]"), model=tiny_model), "--out", out)
    assert "also there, and not counted: 5 records of other plans, 0 of an older llmft" in shown  # those without training belong to both
    assert imported_by("report", out) == "0 ['pandas']"


def test_a_plan_that_was_fetched_needs_no_network(tmp_path, plan_file, tiny_model, llmft_here, server, new_cache):
    cache = new_cache()
    commit = server.push_folder("owner/tiny", tiny_model)
    path = plan_file(("n_shots: [2, 4]", "n_shots: [2]"), ("n_trials: 4", "n_trials: 1"), model="owner/tiny")
    code, shown = llmft_here("fetch", path)
    assert code == 0 and f"owner/tiny, commit {commit}: 0 MiB in {cache}" in shown and "needs no network" in shown
    server.stop()
    code, shown = llmft_here("sweep", path, "--out", tmp_path / "results", "--serial")
    assert code == 0 and "9 trials finished, 0 failed; 9 ran now" in shown
    records = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("trials/*/record.json")]
    assert {record["spec"]["model"]["revision"] for record in records} == {commit}
    assert llmft_here("fetch", "quickstart") == (0, "the plan needs nothing of the hub\n")


def test_a_plan_as_json_for_a_machine_elsewhere(tmp_path, plan_file, tiny_model, llmft_here):
    models = f"{{name: {tiny_model}, gpus: 4, parallel: fsdp}}"
    path = plan_file(("n_shots: [2, 4]", "n_shots: [2]"), ("n_dev: 4", "n_dev: 4\ndevice_memory: 8"), model=models)
    code, shown = llmft_here("plan", path, "--out", tmp_path / "results", "--json")
    content = json.loads(shown)
    assert code == 0 and content["trials"]["report"] == {"new": 7, "done": 0, "failed": 0}
    assert content["machine"]["nodes"][0]["gpu_bytes"] == 8 * 2**30
    needs = {need["method"]: need for need in content["needs"]}
    assert needs.keys() == {"zero_shot", "in_context", "lora"} and needs["lora"]["slot"]["strategy"] == "fsdp"
    assert needs["lora"]["memory"]["n_workers"] == 4 and 0 < needs["lora"]["memory"]["device_bytes"] < 2**30
    assert content["time"] is None and content["disk"]["weights_bytes"] > 0
    code, shown = llmft_here("plan", path, "--out", tmp_path / "results", "--gpus-per-trial", 1, "--device-memory", 0.5)
    assert code == 0 and "does not fit: tiny toy lora: a process needs" in shown and "on 1 GPU with 0.5 GiB" in shown


def test_one_trial_is_printed_and_kept(tmp_path, tiny_model, llmft_here):
    code, shown = llmft_here(
        *TRIAL, "lora", "--model", tiny_model, "--set", "settings.r=2", "--lr", "1e-3", "--out", tmp_path / "r", "--json"
    )
    record = json.loads(shown)
    assert code == 0 and record["spec"]["settings"]["r"] == 2 and record["spec"]["train"]["learning_rate"] == 1e-3
    assert (tmp_path / "r" / "trials" / record["digest"] / "record.json").exists()


def test_a_trial_runs_again_from_its_record(tmp_path, tiny_model, llmft_here):
    first = json.loads(llmft_here(*TRIAL, "lora", "--model", tiny_model, "--seed", 3, "--out", tmp_path / "r", "--json")[1])
    file = tmp_path / "r" / "trials" / first["digest"] / "record.json"
    code, shown = llmft_here("trial", "--spec", file, "--json")
    again = json.loads(shown)
    assert code == 0 and again["digest"] == first["digest"] and again["metrics"] == first["metrics"]
    (tmp_path / "spec.json").write_text(json.dumps(first["spec"] | {"n_shot": 4}))
    assert llmft_here("trial", "--spec", tmp_path / "spec.json")[0] == 2


def test_a_trial_of_a_plan(plan_file, tiny_model):
    from llmft.errors import UserError
    from sweeps.cli.single_trial import TrialOptions, describe_trial
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan

    path = str(plan_file(model=tiny_model))
    cells = {(cell.entry, cell.base.n_shots): cell for cell in build_cells(*load_plan(path))}
    assert describe_trial(TrialOptions(method="zero_shot", file=path))[0] == cells["zero_shot", 0].report_spec({}, 0)
    lora = cells["lora", 4].report_spec({"learning_rate": 0.1}, 2)
    assert describe_trial(TrialOptions(method="lora", n_shots=4, seed=2, learning_rate=0.1, file=path)) == (lora, False)
    options = TrialOptions(method="lora", n_shots=4, assignments=["train.schedule=cosine", "settings.r=2", "keep_weights=true"], file=path)
    spec, keep_weights = describe_trial(options)
    assert keep_weights and spec.settings["r"] == 2 and spec.train.schedule == "cosine" and spec.n_test == 8
    with pytest.raises(UserError, match="choose --shots from 2, 4"):
        describe_trial(TrialOptions(method="lora", file=path))


def test_a_trial_tells_a_terminal_of_each_look_at_dev(tiny_model, capsys, monkeypatch):
    import sys

    from sweeps.cli.app import _run

    for watched, options, n_lines in ((True, (), 4), (False, (), 0), (True, ("--json",), 0)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        assert _run([*TRIAL, "lora", "--model", str(tiny_model), *options]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
        assert len(lines) == n_lines
        if lines:
            assert lines[0].startswith("epoch 1: training loss ") and lines[-1].startswith("epoch 4: ") and "dev score" in lines[-1]


def test_a_finding_is_shown_once_with_its_checkpoints(tiny_model):
    from rich.console import Console

    from llmft.records.record import Finding
    from sweeps.cli.single_trial import TrialOptions, describe_trial, run_one
    from sweeps.display.record_page import record_summary

    spec, _ = describe_trial(TrialOptions("toy", "zero_shot", str(tiny_model), assignments=["n_dev=4", "n_test=4"]))
    twice = [Finding(code="x", severity="note", message="same", set="toy", selection=name) for name in ("last", "best_dev")]
    other = Finding(code="x", severity="note", message="another", set="toy", selection="last")
    record = run_one(spec, "cpu").model_copy(update={"findings": [twice[0], other, twice[1]]})
    console = Console(width=160, file=io.StringIO())
    console.print(record_summary(record))
    shown = console.file.getvalue()
    assert "note: x [toy, last, best_dev]: same\n" in shown and "note: x [toy, last]: another\n" in shown and shown.count("same") == 1


def test_a_teacher_is_shown_round_by_round(tiny_model):
    from rich.console import Console

    from sweeps.cli.single_trial import TrialOptions, describe_trial, run_one
    from sweeps.display.record_page import record_summary

    def shown(*settings: str) -> str:
        assignments = ["n_dev=4", "n_test=4", "settings.n_unlabelled=6", *(f"settings.{setting}" for setting in settings)]
        options = TrialOptions("toy", "context_distillation", str(tiny_model), n_shots=4, epochs=1, assignments=assignments)
        record, console = run_one(describe_trial(options)[0], "cpu"), Console(width=200, file=io.StringIO())
        console.print(record_summary(record))
        scores = [f"{each.dev_score:.1%}" for each in record.teacher.rounds]
        trusted = [f"{each.n_trusted} of 10 answers" for each in record.teacher.rounds]
        (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("teacher ")]
        assert ("; round by round " + ", ".join(scores) in line) == (len(scores) > 1)
        assert ("; trusted " + ", ".join(trusted) in line) == ("only_correct=true" in settings)
        return line

    assert "round by round" not in shown() and "trusted" not in shown()
    assert shown("rounds=2", "distil_shots=true", "only_correct=true").count(",") > 2


def test_a_failed_trial_is_exit_code_1(tiny_model, llmft_here):
    code, shown = llmft_here(*TRIAL, "vanilla", "--model", tiny_model, "--lr", "1e30", "--set", "train.clip_norm=null")
    assert code == 1 and "failed, diverged" in shown


def test_a_learned_prompt_is_shown_with_its_nearest_words():
    shown = llmft(*TRIAL, "prompt_tuning", "--set", "settings.n_virtual_tokens=2").stdout
    assert "nearest words by cosine" in shown and "weights have moved" not in shown
