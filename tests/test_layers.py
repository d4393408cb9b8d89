from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llmft", "sweeps", "analysis")
NEVER = {
    "llmft": {"ray", "optuna", "pandas", "sweeps", "analysis"},
    "analysis": {"torch", "ray", "optuna", "transformers", "peft", "datasets", "sklearn", "sweeps"},
    "sweeps": set(),
}
FROM_LLMFT = {f"llmft.{name}" for name in ("record", "record_files", "spec", "errors", "files", "seeds", "registry")}  # what the analysis may read


def modules_imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module in PACKAGES)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            yield "".join(part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_by(package: str) -> dict[str, set[str]]:
    """module -> the files of the package that import it."""
    found: dict[str, set[str]] = {}
    for path in files(package):
        for module in modules_imported(path):
            found.setdefault(module, set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_layer_imports_nothing_above_or_beside_it(package):
    imported = imported_by(package)
    assert len(imported) > 10
    wrong = {module: where for module, where in imported.items() if module.split(".")[0] in NEVER[package]}
    assert wrong == {}


def test_the_analysis_reads_only_plain_data_of_llmft():
    of_llmft = {module for module in imported_by("analysis") if module.split(".")[0] == "llmft"}
    assert of_llmft and of_llmft <= FROM_LLMFT


def test_the_walk_sees_imports_wherever_they_stand(tmp_path):
    code = """
    import a.b as c
    def f():
        from d.e import g
        importlib.import_module(f"llmft.methods.{name}")
    if TYPE_CHECKING:
        from llmft import model
    """
    (tmp_path / "x.py").write_text(textwrap.dedent(code))
    assert set(modules_imported(tmp_path / "x.py")) == {"a.b", "d.e", "llmft.methods.", "llmft", "llmft.model"}


def run_without(blocked: tuple[str, ...], code: str) -> str:
    block = f"""
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                raise ImportError(name + " is blocked")

    sys.meta_path.insert(0, Block())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(block) + textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_methods_and_tasks_are_known_without_torch():
    code = """
    import json
    from llmft import registry
    for name in registry.TASKS:
        registry.load_task(name)
    known = {name: registry.complete_settings(name, {}) for name in registry.METHODS}
    searched = {name: sorted(registry.method_class(name).search) for name in registry.METHODS}
    print(json.dumps([known, searched]))
    """
    known, searched = json.loads(run_without(("torch", "transformers", "peft", "datasets", "ray", "optuna", "pandas"), code))
    names = {path.stem for path in (ROOT / "llmft" / "methods").glob("*.py") if not path.stem.startswith("_")}
    assert known.keys() == searched.keys() == names


def test_records_are_read_without_torch_and_ray():
    code = "import llmft.record_files, llmft.spec, llmft.errors\nprint('torch' in sys.modules)"
    assert run_without(("torch", "ray", "pandas", "transformers", "sklearn"), code) == "False\n"


def test_a_trial_runs_without_the_layers_above():
    run_without(("ray", "optuna", "sweeps", "analysis"), "import llmft.trial")
