from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCKED = ("torch", "ray", "transformers", "optuna", "peft", "datasets", "sklearn")


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_analysis_runs_without_the_training_stack(full_store):
    code = f"""
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {BLOCKED}:
                raise ImportError(f"{{name}} is not for the analysis")

    sys.meta_path.insert(0, Block())
    import analysis
    from analysis.frames.predictions import open_predictions
    from analysis.frames.few_labels import few_label_selection
    frame = analysis.load(sys.argv[1])
    analysis.to_terminal(analysis.compare(frame), analysis.cross_findings(frame))
    open_predictions(sys.argv[1]).count_rows()
    few_label_selection(sys.argv[1], frame, 5)
    from sweeps.cli import app as cli
    print(cli._run(["report", sys.argv[1]]), cli._run(["compare", sys.argv[1], sys.argv[1], "--other-rule", "last"]))
    print(cli._run(["compare", sys.argv[1], "mosbach2023"]))
    """
    printed = run(code, str(full_store.root))
    assert "\n0 0\n" in printed and printed.endswith("\n0\n")
    assert "checkpoints: best_dev in ours and last in mosbach2023" in printed
    assert (full_store.root / "report" / "report.html").exists()


def test_importing_the_package_is_cheap():
    loaded = run("import sys, analysis; print(*sys.modules)").split()
    assert not {"pandas", "matplotlib", "scipy", "pyarrow", "jinja2", "rich", *BLOCKED} & set(loaded)


def test_every_public_name_is_there():
    import analysis

    assert all(hasattr(analysis, name) for name in analysis.__all__)
    assert all((getattr(analysis, name).__doc__ or "").strip() for name in analysis.__all__ if callable(getattr(analysis, name)))
