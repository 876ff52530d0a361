"""The demo's graphs and engines of one checkpoint, as far as their libraries are there."""

from importlib.util import find_spec
from pathlib import Path

from nvvl.export.engine_targets import TENSORRT_RTX
from nvvl.progress import Progress
from nvvl.reports.deployment import ENGINES_NAME, GRAPHS_NAME

TARGET = "sm120"
"""The GPU that engines are built for: the oldest that TensorRT-RTX builds NVFP4 for."""

_COMMAND = ("nvvl", "demo")


def export_graphs(run: Path, *, progress: Progress | None = None) -> Path | None:
    """Write the ONNX graphs of a checkpoint beside it; None if onnx or onnxruntime is missing."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return None
    from nvvl.export.onnx_export import export_onnx
    from nvvl.export.onnx_recipe import GraphRecipe

    dest = run.with_name(GRAPHS_NAME.format(run.name))
    export_onnx(run, dest, GraphRecipe(), overwrite=True, progress=progress, command=_COMMAND)
    return dest


def build_engines(run: Path, graphs: Path, *, progress: Progress | None = None) -> Path | None:
    """Build engines of a checkpoint's graphs beside it; None if TensorRT-RTX is missing."""
    if find_spec(TENSORRT_RTX.module) is None:
        return None
    from nvvl.export.engine import EngineOptions
    from nvvl.export.engine import build_engines as build

    dest = run.with_name(ENGINES_NAME.format(run.name))
    options = EngineOptions(builder=TENSORRT_RTX, targets=(TARGET,))
    build(graphs, dest, options, overwrite=True, progress=progress, command=_COMMAND)
    return dest
