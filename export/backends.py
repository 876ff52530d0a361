"""Opens what answers a question: the torch model, ONNX graphs on onnxruntime, or engines."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nvvl.export.answer import Backend, TorchBackend
from nvvl.export.onnx_extra import require_onnx

BackendName = Literal["torch", "onnx", "engine"]


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
        EngineError: if the graphs or engines are not.
    """
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
