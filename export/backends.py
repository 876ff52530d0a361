"""Opens what answers a question: the torch model, ONNX graphs on onnxruntime, or engines."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nvvl.errors import EngineError
from nvvl.export.answer import Backend, TorchBackend
from nvvl.export.onnx_extra import require_onnx

BackendName = Literal["torch", "onnx", "engine"]

# What a folder may hold, and what runs it.
_RUN_BY: dict[str, tuple[BackendName, ...]] = {
    "engines": ("engine",),
    "ONNX graphs": ("onnx",),
    "a checkpoint": ("torch", "onnx"),
}


@contextlib.contextmanager
def open_backend(
    folder: Path, backend: BackendName, *, device: str
) -> Iterator[tuple[Backend, str]]:
    """Open a model and say in a few words what runs it.

    Args:
        folder: a checkpoint; for ``onnx``, or a folder of graphs; for ``engine`` one of engines.
        backend: what runs it.
        device: of the torch model; graphs run on the CPU, engines on a GPU.

    Raises:
        HardwareError: if onnxruntime, the engines' library or their GPU is missing.
        CheckpointError: if the checkpoint is not what it should be.
        EngineError: if the graphs or engines are not, or the folder holds what another backend
            runs.
    """
    _require_kind(folder, backend)
    if backend == "torch":
        from nvvl.quantize.load import load_any

        yield TorchBackend(load_any(folder, device=device)), f"torch, {device}"
        return
    require_onnx(runtime=backend == "onnx")
    from nvvl.export.graph_backend import GraphBackend

    if backend == "engine":
        from nvvl.export.runtime import EngineRunner

        engines = EngineRunner(folder)
        yield GraphBackend(engines), f"engines on {engines.library}"
        return
    from nvvl.export.onnx_backend import describe, open_graphs

    with open_graphs(folder) as graphs:
        yield GraphBackend(graphs), describe(graphs)


def _require_kind(folder: Path, backend: BackendName) -> None:
    """Refuse a folder that another backend runs, rather than miss its files one by one."""
    kind = "a checkpoint"
    if any(folder.glob("*.engine")):
        kind = "engines"
    elif any(folder.glob("*.onnx")) and not any(folder.glob("model*.safetensors")):
        kind = "ONNX graphs"
    if backend not in _RUN_BY[kind]:
        raise EngineError(f"{folder}: holds {kind}; pass --backend {_RUN_BY[kind][0]}")
