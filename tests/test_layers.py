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
GROUND = ("errors", "seeds", "hub", "runtime")
ROOMS = {  # room -> the earlier rooms of its package that it may import
    "llmft": {
        **dict.fromkeys(GROUND, GROUND),
        "config": ("errors", "seeds"),
        "records": ("config", "errors"),
        "data": ("config", *GROUND),
        "tasks": ("config", "data", *GROUND),
        "prompting": ("config", "data", "errors"),
        "models": ("config", "data", "prompting", *GROUND),
        "methods": ("config", "data", "prompting", "models", "records", *GROUND),
        "evaluation": ("config", "data", "prompting", "models", "records", *GROUND),
        "training": ("config", "records", "data", "prompting", "models", "methods", "evaluation", *GROUND),
        "trial": ("config", "records", "data", "tasks", "prompting", "models", "methods", "evaluation", "training", *GROUND),
        "toy": ("tasks",),
    },
    "sweeps": {
        "process": (),
        "planning": ("process",),
        "search": ("planning",),
        "store": ("planning", "search"),
        "resources": ("planning", "search"),
        "display": ("planning", "search", "resources"),
        "execution": ("process", "planning", "search", "store", "display"),
        "ray_backend": ("process", "planning", "search", "store", "resources", "display", "execution"),
        "run": ("process", "planning", "search", "store", "resources", "display", "execution", "ray_backend"),
        "cli": ("process", "planning", "search", "store", "resources", "display", "execution", "ray_backend", "run"),
    },
    "analysis": {
        "frames": (),
        "stats": ("frames",),
        "tables": ("frames", "stats"),
        "figures": ("frames", "stats", "tables"),
        "report": ("frames", "stats", "tables", "figures"),
    },
}
MOST_FILES = 10  # in a room, but for the two registries
REGISTRIES = ("llmft/methods", "llmft/tasks")
FROM_LLMFT = {f"llmft.{room}" for room in ("config", "records", "methods", "errors", "seeds")}  # what the analysis may read


def modules_imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            yield "".join(part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_by(package: str) -> dict[str, set[str]]:
    """module -> the files of the package that import it."""
    importers: dict[str, set[str]] = {}
    for path in files(package):
        for module in modules_imported(path):
            importers.setdefault(module, set()).add(str(path.relative_to(ROOT)))
    return importers


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_none_of_the_packages_above_it(package):
    imported = imported_by(package)
    assert len(imported) > 10
    wrong = {module: where for module, where in imported.items() if module.split(".")[0] in NEVER[package]}
    assert wrong == {}


def test_the_analysis_reads_only_plain_data_of_llmft():
    of_llmft = {module for module in imported_by("analysis") if module.split(".")[0] == "llmft"}
    assert of_llmft and of_llmft <= FROM_LLMFT


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_names_every_room(package):
    rooms = {room_of(path) for path in files(package) if path.name != "__init__.py" or path.parent.parent != ROOT}
    assert rooms - {"__init__"} == ROOMS[package].keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_imports_earlier_rooms_alone(package):
    wrong = []
    for path in files(package):
        room = room_of(path)
        for module in modules_imported(path) if room != "__init__" else ():
            top, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if top == package and other in ROOMS[package] and other != room and other not in ROOMS[package][room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_across_rooms_the_face_is_imported(package):
    """`llmft.methods.modules` has a face of its own: the layers need torch, and the registry must not."""
    wrong = []
    for path in files(package):
        for module in modules_imported(path):
            parts = module.split(".")
            inside = len(parts) > 2 and parts[0] in PACKAGES and parts[:2] != [package, room_of(path)]
            registry = module in ("llmft.methods.", "llmft.tasks.", "llmft.methods.modules")
            if inside and not registry and path != ROOT / "analysis" / "__init__.py":
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_ray_is_imported_in_one_room():
    importers = {where for module, paths in imported_by("sweeps").items() if module.split(".")[0] == "ray" for where in paths}
    assert importers and {where for where in importers if not where.startswith("sweeps/ray_backend/")} == set()


PRIVATE = ("ray._private", "ray._raylet", "ray.air", "ray.tune.execution")


def test_no_private_part_of_ray_is_imported():
    imported = imported_by("sweeps")
    assert {module: paths for module, paths in imported.items() if f"{module}.".startswith(tuple(f"{name}." for name in PRIVATE))} == {}


def test_a_room_is_small_and_has_a_face():
    for package in PACKAGES:
        for folder in {path.parent for path in files(package)} - {ROOT / package}:
            code = [path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
            if str(folder.relative_to(ROOT)) not in REGISTRIES:
                assert len(code) <= MOST_FILES, folder
            doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert doc and "TODO" not in doc, folder


def test_the_walk_sees_imports_wherever_they_stand(tmp_path):
    code = """
    import a.b as c
    def f():
        from d.e import g
        importlib.import_module(f"llmft.methods.{name}")
    if TYPE_CHECKING:
        from llmft import models
    """
    (tmp_path / "x.py").write_text(textwrap.dedent(code))
    assert set(modules_imported(tmp_path / "x.py")) == {"a.b", "d.e", "llmft.methods.", "llmft.models"}


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


TRAINING_STACK = ("torch", "transformers", "peft", "datasets", "ray", "optuna", "pandas")


def test_methods_and_tasks_are_known_without_torch():
    code = """
    import json
    from llmft.methods import METHODS, complete_settings, method_class
    from llmft.tasks import TASKS, load_task
    for name in TASKS:
        load_task(name)
    known = {name: complete_settings(name, {}) for name in METHODS}
    searched = {name: sorted(method_class(name).search) for name in METHODS}
    print(json.dumps([known, searched]))
    """
    known, searched = json.loads(run_without(TRAINING_STACK, code))
    names = {path.stem for path in (ROOT / "llmft" / "methods").glob("*.py") if not path.stem.startswith("_")}
    assert known.keys() == searched.keys() == names


@pytest.mark.parametrize(
    "room",
    ["llmft.config", "llmft.records", "llmft.data", "llmft.tasks", "llmft.prompting", "sweeps.planning", "sweeps.display"],
)
def test_a_room_of_plain_data_needs_no_torch(room):
    run_without(("torch", "ray", "pandas", "transformers", "sklearn"), f"import {room}")


def test_a_trial_runs_without_the_layers_above():
    run_without(("ray", "optuna", "sweeps", "analysis"), "import llmft.trial")
