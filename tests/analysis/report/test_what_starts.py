"""What the command line imports; how long that takes is a benchmark's affair."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = {"torch", "transformers", "peft", "datasets", "sklearn", "scipy", "ray", "optuna", "lm_eval"}
SLOW = HEAVY | {"pandas", "numpy", "pyarrow", "matplotlib", "jinja2"}  # typer itself takes pydantic for arguments


def imported(*arguments: str) -> set[str]:
    """The top-level modules in a process that has run `llmft` with these arguments."""
    code = """
    import sys
    from sweeps.cli.app import main
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print("modules:", *sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].removeprefix("modules:").split()}


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["--version"]])
def test_help_imports_nothing_slow(arguments):
    loaded = imported(*arguments)
    assert "typer" in loaded and not loaded & SLOW


def test_a_report_imports_neither_torch_nor_ray(full_store):
    loaded = imported("report", str(full_store.root))
    assert {"pandas", "matplotlib"} <= loaded and not loaded & (HEAVY - {"scipy"})
