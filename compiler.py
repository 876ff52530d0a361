"""Compile a C file at first use and load it, so that installing nvvl needs no compiler.

The shared library is kept in ``${XDG_CACHE_HOME:-~/.cache}/nvvl/`` under a name that hashes the
source, the headers whose names begin with its own, the flags, the processor and nvvl's version: a
home directory shared by unlike machines holds one file for each, and an update never loads an old
one. It is written beside its final name and renamed, so that processes that start together cannot
load half a file.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import nvvl
from nvvl.cpu import describe_cpu
from nvvl.errors import HardwareError

# No -ffast-math and no contraction into fused multiply-adds: the kernels promise exact bits. The
# two -fno- flags only say that errno and floating-point traps are not looked at, which lets loops
# vectorize.
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# For this processor and with threads if the compiler knows how to; some lack an option. The threads
# are torch's, whose OpenMP runtime is loaded already: others would wait for those to stop spinning.
_FLAG_SETS = (
    (*_FLAGS, "-march=native", "-fopenmp"),
    (*_FLAGS, "-march=native"),
    _FLAGS,
)
_TIMEOUT_S = 900  # seconds of work, which takes minutes where other work runs


def load_library(source: Path) -> ctypes.CDLL:
    """Load the shared library of a C file, compiling it unless the cache has it.

    The compiler is ``$CC``, or else ``cc``.

    Raises:
        HardwareError: If there is no compiler, ``$CC`` is no command, it fails or takes too long,
            or the cache cannot be written or loaded.
    """
    path = cache_folder() / f"{source.stem}-{_digest(source)}.so"
    try:
        if not path.exists():
            _compile(source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise HardwareError(
            f"{path}: a compiled library could not be kept or loaded there ({error}); "
            "set XDG_CACHE_HOME to a folder that can be written and run from"
        ) from error


def cache_folder() -> Path:
    """Return where nvvl keeps what takes long to make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nvvl"


def _digest(source: Path) -> str:
    headers = sorted(source.parent.glob(f"{source.stem}*.h"))
    texts = [path.read_bytes() for path in (source, *headers)]
    parts = (repr(_FLAG_SETS), describe_cpu(), nvvl.__version__)
    joined = b"\0".join([*texts, *(part.encode() for part in parts)])
    return hashlib.sha256(joined).hexdigest()[:16]


def _compile(source: Path, path: Path) -> None:
    command = _name_compiler()
    if shutil.which(command[0]) is None:
        raise HardwareError(f"no C compiler: {command[0]} is not on PATH; install gcc or clang")
    path.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for flags in _FLAG_SETS:
            message = _run_compiler([*command, *flags, "-o", str(built), str(source)])
            if not message:
                built.replace(path)
                return
    raise HardwareError(f"{command[0]} could not compile {source.name}: {message}")


def _name_compiler() -> list[str]:
    """Return the words of ``$CC``, a command with its options."""
    said = os.environ.get("CC") or "cc"
    try:
        command = shlex.split(said)
    except ValueError as error:  # a quotation that does not end
        raise HardwareError(f"CC: {said!r:.60} is no command ({error}); unset it for cc") from None
    if not command:
        raise HardwareError(f"CC: required the command of a C compiler, got {said!r:.60}; unset it")
    return command


def _run_compiler(command: list[str]) -> str:
    """Return an empty string, or the first error, else the last line, that the compiler printed."""
    # in a group of its own: what it starts is ended with it
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, printed = process.communicate(timeout=_TIMEOUT_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise HardwareError(f"{command[0]}: no result after {_TIMEOUT_S} s") from None
    if process.returncode == 0:
        return ""
    lines = printed.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error:" in line), lines[-1])
