"""Opens what answers a question: the torch model, or ONNX graphs on onnxruntime."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nvvl.export.answer import Backend, TorchBackend
from nvvl.export.onnx_extra import require_onnx


@contextlib.contextmanager
def open_backend(
    folder: Path, backend: Literal["torch", "onnx"], *, device: str
) -> Iterator[tuple[Backend, str]]:
    """Open a model and say in a few words what runs it.

    Args:
        folder: a checkpoint; for ``onnx``, or a folder of graphs.
        backend: what runs it.
        device: of the torch model; graphs run on the CPU.

    Raises:
        HardwareError: if onnxruntime is not installed.
        CheckpointError: if the checkpoint is not what it should be.
        EngineError: if the graphs are not.
    """
    if backend == "torch":
        from nvvl.quantize.load import load_any

        yield TorchBackend(load_any(folder, device=device)), f"torch, {device}"
        return
    require_onnx(runtime=True)
    from nvvl.export.onnx_backend import OnnxBackend, describe, open_graphs

    with open_graphs(folder) as graphs:
        yield OnnxBackend(graphs), describe(graphs)
