"""Runs a folder of graphs with onnxruntime on the CPU, binding by ``io.json``.

A float32 graph that onnxruntime has kernels for is opened as it is; any other by its float32 twin
(`nvvl.export.onnx_twin`). Inputs and outputs are torch tensors in float32, whatever the graph's
dtype; states of an FP8 cache are the values of its codes.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import _pybind_state
from torch import Tensor

from nvvl.errors import EngineError, first_line
from nvvl.export.graph_runner import GraphRunner, States, StepOutput
from nvvl.export.onnx_twin import make_twin, needs_twin

__all__ = ["GraphFolder", "States", "StepOutput", "open_session"]

# Above this many bytes a model cannot be handed over in memory (protobuf ends at 2 GiB).
_LARGEST_IN_MEMORY = 1_900_000_000

# onnxruntime's own exceptions have no base but Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        value
        for value in vars(_pybind_state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)


class GraphFolder(GraphRunner):
    """The three graphs of a folder, opened when they are first used.

    Attributes:
        folder: Where they lie.
        io: The content of ``io.json``.
    """

    def __init__(
        self, folder: Path, *, expose_inputs: bool = False, num_threads: int | None = None
    ) -> None:
        """Read ``io.json``.

        Args:
            folder: what ``nvvl export onnx`` wrote.
            expose_inputs: whether runs also give the inputs of quantized linears.
            num_threads: threads of onnxruntime; as many as torch's if None.

        Raises:
            EngineError: if the folder is not one of graphs.
        """
        super().__init__(folder)
        self._expose_inputs = expose_inputs
        self._num_threads = num_threads or torch.get_num_threads()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run_graph(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph; floating-point values become float32.

        Raises:
            EngineError: if the graph cannot be read, or onnxruntime refuses it or its inputs.
        """
        if name not in self._sessions:
            path = self.folder / self.io["graphs"][name]["file"]
            self._sessions[name] = open_session(
                path, expose_inputs=self._expose_inputs, num_threads=self._num_threads
            )
        session = self._sessions[name]
        wanted = [port.name for port in session.get_inputs()]
        arrays = {key: _to_numpy(inputs[key]) for key in wanted}
        names = [port.name for port in session.get_outputs()]
        try:
            values = session.run(None, arrays)
        except _ORT_ERRORS as error:
            raise EngineError(
                f"{self.folder}: {name}: onnxruntime cannot run it ({first_line(error)})"
            ) from error
        outputs = zip(names, values, strict=True)
        return {key: torch.from_numpy(np.asarray(value)) for key, value in outputs}


def open_session(
    path: Path, *, expose_inputs: bool = False, num_threads: int = 1
) -> onnxruntime.InferenceSession:
    """Open a graph, or its float32 twin, with onnxruntime's CPU provider.

    Args:
        path: an ONNX file that nvvl wrote.
        expose_inputs: as of `nvvl.export.onnx_twin.make_twin`.
        num_threads: threads of one run.

    Raises:
        EngineError: if the graph cannot be read, or onnxruntime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    try:
        if not expose_inputs and not needs_twin(onnx.load(path, load_external_data=False)):
            return onnxruntime.InferenceSession(str(path), options, providers)
        twin = make_twin(path, expose_inputs=expose_inputs)
        if _num_tensor_bytes(twin) <= _LARGEST_IN_MEMORY:
            return onnxruntime.InferenceSession(twin.SerializeToString(), options, providers)
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(twin, Path(folder) / "twin.onnx", save_as_external_data=True)
            return onnxruntime.InferenceSession(f"{folder}/twin.onnx", options, providers)
    except (DecodeError, OSError, ValueError, *_ORT_ERRORS) as error:
        raise EngineError(f"{path}: onnxruntime cannot open it ({first_line(error)})") from error


def _num_tensor_bytes(model: onnx.ModelProto) -> int:
    """Count what makes a model large; `ByteSize` fails above 2 GiB, where it matters."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    wide = tensor if tensor.dtype == torch.int64 else tensor.float()
    return wide.contiguous().numpy()
