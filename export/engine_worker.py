"""Builds one engine from one ONNX graph, in a process of its own.

    python -m nvvl.export.engine_worker REQUEST.json

A builder is a large C++ program: it may run out of memory or crash, and what it allocated comes
back only when its process ends. So each engine gets a process; `nvvl.export.engine` starts it and
reads one JSON object a line from stdout: ``{"step": ..., "num_steps": ...}`` while it works, then
one with ``"sha256"`` or with ``"error"``. The builder's own messages go to the log file.

TensorRT-RTX and TensorRT share this code: their Python packages have one interface, apart from
targets (RTX names them, TensorRT builds for the GPU it finds) and timing caches (which RTX cannot
use without a GPU). Neither torch nor onnx is imported.
"""

import hashlib
import importlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# min, opt and max of every dimension of an input
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Attributes:
        module: Python package of the builder.
        graph: The ONNX file; its external data lies beside it.
        engine: The file to write.
        log: The file that the builder's messages are appended to.
        targets: Compute capabilities such as ``sm120``; empty builds for the GPU at hand.
        shape_profile: Range of shapes of each input with dynamic dimensions.
        weight_streaming: Whether the engine may leave weights in CPU memory.
        timing_cache: File of measured kernel times, read and then written; TensorRT only.
    """

    module: str
    graph: Path
    engine: Path
    log: Path
    targets: tuple[str, ...]
    shape_profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    weight_streaming: bool = False
    timing_cache: Path | None = None

    def write(self, path: Path) -> None:
        """Write the request for the worker to read."""
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "BuildRequest":
        """Read a request."""
        values = json.loads(path.read_text(encoding="utf-8"))
        cache = values.pop("timing_cache")
        return cls(
            graph=Path(values.pop("graph")),
            engine=Path(values.pop("engine")),
            log=Path(values.pop("log")),
            timing_cache=None if cache is None else Path(cache),
            **values,
        )


class _BuildError(Exception):
    """The builder said no; its own messages are the reason."""


def build(request: BuildRequest) -> dict[str, Any]:
    """Build and write one engine.

    Returns:
        ``sha256``, ``size_bytes``, ``seconds``, ``peak_memory_bytes`` and the builder's version.

    Raises:
        _BuildError: with the builder's messages.
    """
    trt = importlib.import_module(request.module)
    started = time.monotonic()
    with request.log.open("a", encoding="utf-8") as log_file:
        logger = _make_logger(trt, log_file)
        builder = trt.Builder(logger)
        network = builder.create_network(_strongly_typed(trt))
        _parse(trt, network, request, logger)
        config = builder.create_builder_config()
        _configure(trt, builder, network, config, request)
        with request.engine.open("wb") as engine_file:
            writer = _make_writer(trt, engine_file)
            if not builder.build_serialized_network_to_stream(network, config, writer):
                # what follows the first message is about a GPU that was not needed before
                raise _BuildError(logger.errors[0] if logger.errors else "no message")
        _save_timing_cache(config, request)
    return {
        "sha256": writer.hash.hexdigest(),
        "size_bytes": request.engine.stat().st_size,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "version": trt.__version__,
    }


def _strongly_typed(trt: Any) -> int:
    # TensorRT 11 and TensorRT-RTX know no other kind of network, but RTX still wants the flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, request: BuildRequest, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.graph)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        reasons = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
        raise _BuildError(" / ".join(reasons) or "the graph could not be parsed")
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # without a fused kernel for this head size or dtype, build it from plain ones
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(trt: Any, builder: Any, network: Any, config: Any, request: BuildRequest) -> None:
    if request.targets:
        config.num_compute_capabilities = len(request.targets)
        for number, target in enumerate(request.targets):
            capability = getattr(trt.ComputeCapability, target.upper())
            config.set_compute_capability(capability, number)
    if request.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        if name in request.shape_profile:
            profile.set_shape(name, *request.shape_profile[name])
    config.add_optimization_profile(profile)
    config.progress_monitor = _make_monitor(trt)
    if request.timing_cache is not None:
        cache = request.timing_cache
        saved = cache.read_bytes() if cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(saved), ignore_mismatch=False):
            raise _BuildError(
                f"{cache}: the timing cache is of another GPU or version; give another file, or "
                "delete this one"
            )


def _save_timing_cache(config: Any, request: BuildRequest) -> None:
    if request.timing_cache is not None:
        request.timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))


# The builder's callbacks are classes of the package itself, so they are made once it is imported.


def _make_logger(trt: Any, file: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                file.write(f"{severity.name}: {message}\n")
                file.flush()  # a crash must not take the last message with it
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def _make_writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.hash = hashlib.sha256()

        def write(self, data: bytes) -> int:
            self.hash.update(data)
            return int(file.write(data))

    return Writer()


def _make_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase; inner ones come and go."""

        def __init__(self) -> None:
            super().__init__()
            self.outer: str | None = None
            self.num_steps = 0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.outer, self.num_steps = name, num_steps

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer:
                _say({"step": step + 1, "num_steps": self.num_steps})
            return True

        def phase_finish(self, name: str) -> None:
            if name == self.outer:
                _say({"step": self.num_steps, "num_steps": self.num_steps})

    return Monitor()


def _say(values: Mapping[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    """Build what the request file asks for."""
    request = BuildRequest.read(Path(sys.argv[1]))
    try:
        _say(build(request))
    except _BuildError as error:
        _say({"error": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
