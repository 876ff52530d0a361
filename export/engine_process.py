"""Runs `nvvl.export.engine_worker` and turns whatever becomes of it into a result or an error."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvvl.errors import EngineError
from nvvl.export.engine_worker import BuildRequest

# (how many steps are done, of how many)
StepCallback = Callable[[int, int], None]

_WORKER = "nvvl.export.engine_worker"


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """One engine that was written.

    Attributes:
        path: The file.
        sha256: Of the file, taken while it was written.
        size_bytes: Of the file.
        seconds: Parsing, building and writing.
        peak_memory_bytes: Of the builder's process.
        version: Of the builder.
    """

    path: Path
    sha256: str
    size_bytes: int
    seconds: float
    peak_memory_bytes: int
    version: str


def run_build(request: BuildRequest, *, on_step: StepCallback | None = None) -> BuiltEngine:
    """Build one engine in a process of its own.

    Args:
        request: What to build.
        on_step: Called as the builder reports its steps.

    Raises:
        EngineError: with the builder's own message, or the signal that ended it; the engine file
            is then removed and the log stays.
    """
    request_path = request.engine.with_suffix(".request.json")
    request.write(request_path)
    try:
        result = _run(request, request_path, on_step)
    except BaseException:
        request.engine.unlink(missing_ok=True)
        raise
    finally:
        request_path.unlink()
    return BuiltEngine(path=request.engine, **result)


def _run(request: BuildRequest, request_path: Path, on_step: StepCallback | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with request.log.open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", _WORKER, str(request_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    values = _read_line(line, log)
                    if "step" not in values:
                        result |= values
                    elif on_step is not None:
                        on_step(values["step"], values["num_steps"])
            except BaseException:
                worker.kill()
                raise
    name = request.graph.stem
    if worker.returncode < 0:
        reason = signal.Signals(-worker.returncode).name
        raise EngineError(
            f"{name}: the builder was ended by {reason}, which the system sends when memory runs "
            f"out, or the builder gets when it crashes"
        )
    if "error" in result:
        raise EngineError(f"{name}: {request.module} refused: {result['error']}")
    if worker.returncode != 0 or "sha256" not in result:
        raise EngineError(
            f"{name}: the builder's process ended with {worker.returncode} and no engine"
        )
    return result


def _read_line(line: str, log: Any) -> dict[str, Any]:
    """Read one line of the worker; what a library printed between them goes to the log."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        log.write(line)
        return {}
    return values if isinstance(values, dict) else {}
