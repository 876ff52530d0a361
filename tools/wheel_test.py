"""Build the wheel, install it into a new environment and use it outside the repository.

The new environment gets nvvl from the wheel alone. What nvvl depends on is not installed a second
time (gigabytes): a path file points at the packages of the environment that runs this script. A
path file that is reached that way is not followed further, so the editable install of the
repository stays out, and a file missing from the wheel is missing here. That every third-party
import is declared in pyproject.toml is what ``tests/test_package.py`` tests.

    make wheel-test
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = ("nvvl/tests/", "nvvl/tools/", "nvvl/benchmarks/", "nvvl/build/")


def build_wheel(folder: Path) -> Path:
    """Build an sdist, and from it the wheel, so nothing is left in the repository but egg-info."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Compare the wheel's files with the package folders they come from."""
    names = set(zipfile.ZipFile(wheel).namelist())
    strays = sorted(name for name in names if name.startswith(NOT_SHIPPED))
    missing = sorted(f"nvvl/{name}" for name in shipped_files() if f"nvvl/{name}" not in names)
    if strays or missing:
        sys.exit(f"{wheel.name}: must not be there: {strays}; missing: {missing}")


# What the new environment sees of its neighbour's packages: the core's alone.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

EXTRAS = {"av", "lm_eval", "mamba_ssm", "onnx", "onnxruntime", "pynvml", "pypdfium2"}
EXTRAS |= {"tensorboardX", "tensorrt", "tensorrt_rtx"}


class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else super().find_spec(name, path, target)


sys.meta_path[:] = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
"""


def shipped_files() -> list[str]:
    """List what users need of the package's folders, relative to the root."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), *(file for folder in packages for file in folder.rglob("*"))]
    names = [str(file.relative_to(ROOT)) for file in files if file.is_file()]
    return [name for name in names if "__pycache__" not in name and name != "reports/LOG.md"]


def create_environment(folder: Path, wheel: Path) -> Path:
    """Install the wheel alone into a new environment and return its folder of commands."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    Path(purelib, "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    return folder / "bin"


def use(commands: Path, folder: Path) -> None:
    """Run the installed commands in a folder that has nothing of the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command: str) -> str:
        print("$", *command, flush=True)
        done = subprocess.run(
            [str(commands / command[0]), *command[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"exit {done.returncode}: {' '.join(command)}\n{done.stdout}")
        return done.stdout

    run("nvvl", "--help")
    run("nvvl-quantize", "--help")
    embedded = Path(run("nvvl", "path", "embedded").strip())
    if not embedded.is_relative_to(commands.parent):
        sys.exit(f"the embedded model comes from {embedded}, not from the wheel")
    run("nvvl-quantize", "fp8", "embedded", "fp8", "--samples", "4")
    run("nvvl", "verify", "fp8", "--against", "embedded")
    run("nvvl", "evaluate", "embedded", "fp8", "--items", "4", "--gate", "0", "-o", "runs")
    run("nvvl", "report", "runs/embedded", "runs/fp8", "-o", "report.html")


def main() -> None:
    """Build, look inside, install and use."""
    with tempfile.TemporaryDirectory(prefix="nvvl-wheel-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        check_contents(wheel)
        commands = create_environment(folder / "venv", wheel)
        work = folder / "elsewhere"
        work.mkdir()
        use(commands, work)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, works outside the repository")


if __name__ == "__main__":
    main()
