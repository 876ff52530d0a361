"""Runs a folder of engines on a GPU, with TensorRT or TensorRT-RTX, step by step.

Bindings go by name: every input and output of an engine must be what ``io.json`` says, dtype and
dimensions, and every run must lie within the shapes the engine was built for; both are refused with
names instead of being left to the library. States stay on the GPU in the dtype the engine has.
Decoding into a cache of fixed capacity always has the same shapes, so its launches are captured
once as a CUDA graph and replayed.

**This has not run on a GPU.** What tests run is everything around the library's calls, against a
stand-in that computes with onnxruntime.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.errors import EngineError, HardwareError
from nvvl.export.engine_folder import EngineFolder, open_engine_folder
from nvvl.export.graph_runner import GraphRunner
from nvvl.export.shape_profile import Span

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int64": torch.int64,
}
_TRT_NAMES = {"f32": "FLOAT", "bf16": "BF16", "fp8": "FP8", "int64": "INT64"}


class EngineRunner(GraphRunner):
    """The engines of one folder, loaded when they are first used."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cuda") -> None:
        """Check the folder and the machine; no engine is loaded yet.

        Args:
            folder: What ``nvvl export engine`` wrote.
            device: A CUDA device.

        Raises:
            EngineError: if the folder is not complete and unchanged.
            HardwareError: if the builder's package or a GPU is missing.
        """
        super().__init__(folder)
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise HardwareError(
                f"{folder}: engines run on a GPU, and torch finds no CUDA device here; to look at "
                "answers without one: nvvl chat --backend onnx"
            )
        self._files: EngineFolder = open_engine_folder(folder)
        self._trt = self._files.import_library()
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._spans = {name: Span(*span) for name, span in self.io["dimensions"].items()}
        self._engines: dict[str, Engine] = {}

    @property
    def library(self) -> str:
        """Name and version of what runs the engines."""
        return f"{self._trt.__name__} {self._trt.__version__}"

    def run_graph(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one engine; what the host reads comes back in float32 on the CPU."""
        if name not in self._engines:
            entry = self.io["graphs"][name]
            path = self.folder / entry["file"]
            replays = name.startswith("decode") and self.model["kv_cache"] == "fixed"
            self._engines[name] = Engine(
                self._trt, self._runtime, path, entry, self._spans, self.device, replays=replays
            )
        outputs = self._engines[name].run(inputs)
        for read in {"image_embeds", "logits"} & outputs.keys():
            outputs[read] = outputs[read].float().cpu()
        return outputs


class Engine:
    """One engine, bound by its entry of ``io.json``."""

    def __init__(
        self,
        trt: Any,
        runtime: Any,
        path: Path,
        entry: Mapping[str, Any],
        spans: Mapping[str, Span],
        device: torch.device,
        *,
        replays: bool,
    ) -> None:
        """Load the engine and compare its bindings.

        Raises:
            EngineError: if the library does not take it on this GPU, or bindings differ.
        """
        self._path, self._spans, self._device = path, spans, device
        self._inputs = {port["name"]: port for port in entry["inputs"]}
        self._outputs = {port["name"]: port for port in entry["outputs"]}
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{path}: {trt.__name__} {trt.__version__} does not take this engine here; it "
                "needs the GPU it was built for and the version that manifest.json names"
            )
        self._check_bindings(trt)
        if self._engine.streamable_weights_size:  # built with --weight-streaming
            budget = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = budget
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{path}: {trt.__name__} cannot run it: out of GPU memory")
        self._replays = replays
        self._buffers: dict[str, Tensor] = {}
        self._graph: Any = None
        # an empty tensor has no address, and the library wants one
        self._no_bytes = torch.empty(16, dtype=torch.uint8, device=device)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on what the engine takes of ``inputs``; gives new tensors on the device.

        Raises:
            EngineError: if an input is missing or of a shape the engine was not built for.
        """
        given = {name: self._take(name, inputs) for name in self._inputs}
        self._check_shapes({name: tuple(tensor.shape) for name, tensor in given.items()})
        if not self._replays:
            return self._launch(self._bind(given))
        if self._graph is None:
            self._buffers = self._bind({name: tensor.clone() for name, tensor in given.items()})
            self._graph = self._capture(self._buffers)
        for name, tensor in given.items():
            self._buffers[name].copy_(tensor)
        self._graph.replay()
        return {name: self._buffers[name].clone() for name in self._outputs}

    def _take(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name not in inputs:
            raise EngineError(f"{self._path}: input {name} was not given")
        dtype = DTYPES[self._inputs[name]["dtype"]]
        return inputs[name].to(self._device, dtype).contiguous()

    def _bind(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the context its inputs, and outputs of the shapes that follow from them."""
        tensors = dict(given)
        for name, tensor in given.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for name, port in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=DTYPES[port["dtype"]], device=self._device)
        for name, tensor in tensors.items():
            address = tensor.data_ptr() or self._no_bytes.data_ptr()
            self._context.set_tensor_address(name, address)
        return tensors

    def _launch(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise EngineError(f"{self._path}: the engine failed; the library's log says why")
        return {name: tensors[name] for name in self._outputs}

    def _capture(self, tensors: Mapping[str, Tensor]) -> Any:
        """Run once, so that all is allocated, then record the launches."""
        self._launch(tensors)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(tensors)
        return graph

    def _check_bindings(self, trt: Any) -> None:
        """Compare names, dtypes and dimensions with ``io.json``."""
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        ports = self._inputs | self._outputs
        faults = [f"{name}: not in io.json" for name in sorted(names - ports.keys())]
        faults += [f"{name}: not in the engine" for name in sorted(ports.keys() - names)]
        for name in sorted(names & ports.keys()):
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = getattr(trt.DataType, _TRT_NAMES[ports[name]["dtype"]])
            shape = [-1 if isinstance(dim, str) else dim for dim in ports[name]["shape"]]
            if is_input != (name in self._inputs):
                faults.append(f"{name}: {'an input' if is_input else 'an output'} of the engine")
            if self._engine.get_tensor_dtype(name) != dtype:
                found = self._engine.get_tensor_dtype(name)
                faults.append(f"{name}: {found} in the engine, {ports[name]['dtype']} in io.json")
            if list(self._engine.get_tensor_shape(name)) != shape:
                found = list(self._engine.get_tensor_shape(name))
                faults.append(f"{name}: {found} in the engine, {ports[name]['shape']} in io.json")
        if faults:
            raise EngineError(f"{self._path}: {'; '.join(faults)}; build the engines again")

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a shape that the engine was not built for, by the name of its dimension."""
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            wanted = self._inputs[name]["shape"]
            if len(shape) != len(wanted):
                raise EngineError(f"{self._path}: {name}: required {wanted}, got {list(shape)}")
            for size, dim in zip(shape, wanted, strict=True):
                expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise EngineError(
                        f"{self._path}: {name}: required {wanted}, got {list(shape)}, where "
                        f"{dim} is {expected}"
                    )
        for dim, size in sizes.items():
            span = self._spans[dim]
            if not span.low <= size <= span.high:
                raise EngineError(
                    f"{self._path}: {dim} is {size}, the engine was built for {span.low} to "
                    f"{span.high}; build it with --shape {dim}=..."
                )
