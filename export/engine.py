"""``nvvl export engine``: TensorRT engines from a folder of ONNX graphs, and what they came from.

Everything that can be known beforehand is refused beforehand: a target without the precision, a
shape profile that contradicts the model, a graph that needs more memory or disk than there is. Then
each graph is built in a process of its own (`nvvl.export.engine_process`), in a folder that takes
its name only when it is complete:

    vision.engine  prefill.engine  decode.engine     or prefill.0.engine, prefill.1.engine, ...
    io.json                                          as the graphs have it, and the shape profile
    config.json, tokenizer, embedding.safetensors    what a runtime needs beside engines
    build.log                                        the builder's own messages
    manifest.json                                    checkpoint, graphs, engines: hashes; builder,
                                                     target, flags, times

Nothing is run here. Building needs no GPU with TensorRT-RTX; running always does.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nvvl
from nvvl.errors import EngineError, require_disk, require_unread
from nvvl.export.engine_graphs import GraphSet, open_graphs
from nvvl.export.engine_memory import available_memory, require_build_memory
from nvvl.export.engine_process import BuiltEngine, run_build
from nvvl.export.engine_targets import Builder, require_cache, require_targets
from nvvl.export.engine_worker import BuildRequest, ShapeRange
from nvvl.export.onnx_io import IO_NAME
from nvvl.export.parts import layer_sizes
from nvvl.export.shape_profile import Span, choose_spans, make_shape_profile
from nvvl.model.hashing import hash_file
from nvvl.progress import Progress
from nvvl.quantize.manifest import write_json
from nvvl.staging import MANIFEST_NAME, staged_folder

LOG_NAME = "build.log"

# An engine is its weights and a few MB of kernels.
_KERNEL_BYTES = 16 * 10**6


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How engines are built.

    Attributes:
        builder: Who builds.
        targets: Such as ``sm120``; several go into one engine.
        spans: Of dynamic dimensions, in place of those that the graphs come with.
        weight_streaming: Whether engines may leave weights in CPU memory.
        timing_cache: File of measured kernel times; TensorRT only.
        memory_bytes: What a build may take; None for what the system has.
    """

    builder: Builder
    targets: tuple[str, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)
    weight_streaming: bool = False
    timing_cache: Path | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.timing_cache is not None and not self.builder.needs_gpu:
            raise EngineError(
                f"--timing-cache: {self.builder.name} measures nothing while it builds; leave it "
                "out, or use --builder tensorrt"
            )
        cache = self.timing_cache
        if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
            raise EngineError(
                f"--timing-cache: required a file in a folder that exists, got {cache}; make the "
                "folder, or name another file"
            )

    def require_memory(self, name: str, weight_bytes: int, layer_bytes: Sequence[int]) -> None:
        """Refuse a graph that takes more memory to build than there is; see `engine_memory`."""
        require_build_memory(
            name,
            weight_bytes,
            available_memory() if self.memory_bytes is None else self.memory_bytes,
            layer_bytes=layer_bytes,
            is_option=self.memory_bytes is not None,
        )


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """What was built.

    Attributes:
        folder: Where it lies.
        engines: One for each graph, by the graph's name.
    """

    folder: Path
    engines: Mapping[str, BuiltEngine]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return {
            "folder": str(self.folder),
            "engines": {name: _describe(engine) for name, engine in self.engines.items()},
        }


def build_engines(
    graphs_folder: Path,
    dest: Path,
    options: EngineOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> EngineResult:
    """Build an engine of each graph of a folder.

    Args:
        graphs_folder: What ``nvvl export onnx`` wrote.
        dest: The folder to write.
        options: How to build.
        overwrite: Whether an earlier output at ``dest`` may be replaced.
        progress: Called as the builder reports its steps.
        command: The command line, for the manifest.

    Raises:
        EngineError: if a graph was altered, cannot be built as asked, or the builder refuses it.
        HardwareError: if a build needs more memory than there is.
        OutputError: if ``dest`` exists, or the disk is too small.
    """
    dest = dest.absolute()  # "." would mean a removed folder, once the current one is replaced
    require_unread(dest, [graphs_folder], within=True)  # engines may lie beside their graphs
    with staged_folder(dest, sources=(), overwrite=overwrite) as folder:
        engines = build_into(folder, graphs_folder, dest, options, progress, command)
    return EngineResult(folder=dest, engines=engines)


def build_into(
    folder: Path,
    graphs_folder: Path,
    dest: Path,
    options: EngineOptions,
    progress: Progress | None,
    command: Sequence[str],
) -> dict[str, BuiltEngine]:
    """Build into an empty folder that will take the name ``dest``; otherwise as `build_engines`."""
    graphs = open_graphs(graphs_folder)
    require_targets(options.builder, options.targets, graphs.precisions)
    require_cache(options.builder, graphs.io["model"]["kv_cache"], graphs.io["model"]["kv_dtype"])
    spans = choose_spans(graphs, options.spans)
    profiles = {name: make_shape_profile(info, spans) for name, info in graphs.infos.items()}
    for name, info in graphs.infos.items():
        options.require_memory(name, info.weight_bytes, layer_sizes(info.weights))
    graphs.require_unchanged()
    needed = sum(info.weight_bytes + _KERNEL_BYTES for info in graphs.infos.values())
    require_disk(dest.parent, needed, "the engines need about")
    kept_log = dest.with_name(f"{dest.name}.{LOG_NAME}")
    try:
        engines = _build_all(folder, graphs, profiles, options, progress)
    except EngineError as error:
        shutil.move(folder / LOG_NAME, kept_log)
        raise EngineError(f"{error}; log: {kept_log}") from None
    kept_log.unlink(missing_ok=True)  # of an earlier failure
    _write_side_files(folder, graphs, spans)
    manifest = _make_manifest(folder, graphs, engines, options, command)
    write_json(folder / MANIFEST_NAME, manifest)
    return {name: replace(engine, path=dest / engine.path.name) for name, engine in engines.items()}


def _build_all(
    folder: Path,
    graphs: GraphSet,
    profiles: Mapping[str, Mapping[str, ShapeRange]],
    options: EngineOptions,
    progress: Progress | None,
) -> dict[str, BuiltEngine]:
    engines = {}
    for name, info in graphs.infos.items():
        request = BuildRequest(
            module=options.builder.module,
            graph=info.path.absolute(),
            engine=folder / f"{name}.engine",
            log=folder / LOG_NAME,
            # TensorRT builds for the GPU it finds, which was compared with the target before
            targets=() if options.builder.needs_gpu else options.targets,
            shape_profile=profiles[name],
            weight_streaming=options.weight_streaming,
            timing_cache=options.timing_cache,
        )

        def report(num_done: int, num_all: int, name: str = name) -> None:
            if progress is not None:
                progress(f"build {name}", num_done, num_all)

        engines[name] = run_build(request, on_step=report)
    return engines


def _write_side_files(folder: Path, graphs: GraphSet, spans: Mapping[str, Span]) -> None:
    for path in graphs.side_files():
        shutil.copyfile(path, folder / path.name)
    io = {**graphs.io, "dimensions": {name: list(span) for name, span in spans.items()}}
    for name, entry in io["graphs"].items():
        entry["file"] = f"{name}.engine"
    write_json(folder / IO_NAME, io)


def _make_manifest(
    folder: Path,
    graphs: GraphSet,
    engines: Mapping[str, BuiltEngine],
    options: EngineOptions,
    command: Sequence[str],
) -> dict[str, Any]:
    version = next(engine.version for engine in engines.values())
    return {
        "nvvl_version": nvvl.__version__,
        "command": list(command),
        "builder": {"name": options.builder.name, "version": version},
        "targets": list(options.targets),
        "flags": {
            "strongly_typed": True,
            "weight_streaming": options.weight_streaming,
            "timing_cache": options.timing_cache is not None,
        },
        "checkpoint": graphs.manifest["checkpoint"],
        "graphs": {name: graphs.hash_of(name) for name in graphs.infos},
        "engines": {name: _describe(engine) for name, engine in engines.items()},
        "files": {
            path.name: hash_file(path)
            for path in sorted(folder.iterdir())
            if path.suffix != ".engine"
        },
    }


def _describe(engine: BuiltEngine) -> dict[str, Any]:
    return {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "size_bytes": engine.size_bytes,
        "build_seconds": engine.seconds,
        "peak_memory_bytes": engine.peak_memory_bytes,
    }
