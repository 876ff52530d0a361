"""The package that is installed is the one in the repository: folders, version, dependencies.

The root of the repository is the package ``nvvl``. Setuptools does not find packages by itself in
such a layout, so a forgotten one would work in an editable install and be missing from the wheel.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nvvl

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
ROOMS = ["calib_data", "quantize", "distill", "export", "reports"]  # data flows left to right


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_modules() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in PACKAGE_FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def other_modules() -> Iterator[Path]:
    for folder in ("tests", "tools", "benchmarks"):
        yield from (ROOT / folder).rglob("*.py")


def imported_names(module: Path) -> Iterator[str]:
    """Every module name an import statement of a file gives, at the top or inside functions."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write nvvl.…"
            yield str(node.module)


def requirement_names(lines: list[str]) -> set[str]:
    names = (re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_pyproject_lists_every_package_folder(pyproject: dict[str, Any]) -> None:
    nested = sorted({path.parent for path in ROOT.glob("[a-z]*/*/**/__init__.py")})
    assert nested == [], "a nested package: list it in pyproject.toml and here"
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(
        ["nvvl", *(f"nvvl.{folder}" for folder in PACKAGE_FOLDERS)]
    )


def test_version_is_the_same_in_code_metadata_and_pyproject(pyproject: dict[str, Any]) -> None:
    assert nvvl.__version__ == pyproject["project"]["version"]
    assert nvvl.__version__ == importlib.metadata.version("nvvl")


def test_root_holds_package_modules_only() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "cli.py",
        "compiler.py",
        "console.py",
        "cpu.py",
        "errors.py",
        "options.py",
        "progress.py",
        "staging.py",
        "toml_tables.py",
    ]


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_data_file_pattern_matches_something(pyproject: dict[str, Any]) -> None:
    for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.removeprefix("nvvl").removeprefix(".")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


@pytest.mark.parametrize("installed", [True, False], ids=["package", "tests and tools"])
def test_third_party_imports_are_declared(pyproject: dict[str, Any], installed: bool) -> None:
    project = pyproject["project"]
    declared = requirement_names(project["dependencies"])
    for extra, lines in project["optional-dependencies"].items():
        if extra != "dev" or not installed:
            declared |= requirement_names(lines)
    # tools/interop/vllm_cpu.py runs in an environment of its own
    interop = (ROOT / "tools" / "interop" / "requirements.txt").read_text(encoding="utf-8")
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for module in package_modules() if installed else other_modules():
        for name in {name.split(".")[0] for name in imported_names(module)}:
            local = name == "nvvl" or (module.parent / f"{name}.py").exists()
            if local or name in sys.stdlib_module_names:
                continue
            if module.name == "vllm_cpu.py" and f"\n{name}-cpu==" in interop:
                continue
            if (module.name, name) == ("lmms_model.py", "lmms_eval"):  # which imports that file
                continue
            distributions = providers.get(name, [name])  # an extra may not be installed here
            if not declared & requirement_names(distributions):
                undeclared.add(f"{module.relative_to(ROOT)}: {name}")
    assert sorted(undeclared) == []


def test_rooms_import_the_model_and_rooms_to_their_left_only() -> None:
    rooms = {"model": set(ROOMS)} | {room: set(ROOMS[i + 1 :]) for i, room in enumerate(ROOMS)}
    screen = {"console", "options"}  # for the verbs of a room, in *command.py, alone
    wrong = []
    for module in package_modules():
        room = module.parent.relative_to(ROOT).as_posix()
        if room not in rooms:
            continue
        has_verbs = module.name.endswith("command.py")
        forbidden = rooms[room] | {"cli"} | (set() if has_verbs else screen)
        wrong += [
            f"{module.relative_to(ROOT)} imports {name}"
            for name in imported_names(module)
            if name.startswith("nvvl.") and name.split(".")[1] in forbidden
        ]
    assert wrong == []


def test_constraints_pin_every_direct_dependency(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line] == []
    extras = pyproject["project"]["optional-dependencies"]
    (own,) = [line for line in extras["dev"] if line.startswith("nvvl[")]
    direct = [*pyproject["project"]["dependencies"], *extras["dev"]]
    for extra in own.removeprefix("nvvl[").removesuffix("]").split(","):
        direct += extras[extra]
    assert "onnx" in requirement_names(direct)
    assert requirement_names(direct) - {"nvvl"} <= requirement_names(pins)
    assert "torch==2.13.0" in pins


def test_ci_runs_what_a_contributor_does_in_the_same_order() -> None:
    by_hand = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(".ci/run")[0]
    told = re.findall(r"^    make ([\w-]+)", by_hand, re.MULTILINE)
    in_ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ["install", *re.findall(r"^make ([\w-]+)", in_ci, re.MULTILINE)] == told


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "errors",
        "model.config",
        "model.checkpoint",
        "quantize.recipe",
        "quantize.presets",
        "quantize.plan",
        "export.server_rules",
    ],
)
def test_quick_modules_do_not_import_torch(module: str) -> None:
    program = (
        f"import sys, nvvl.{module}\n"
        "print([n for n in ('torch', 'transformers', 'modelopt') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
