"""Stands in for the package ``tensorrt``, which needs a GPU.

Its builder records what it was asked; an "engine" is that record. Its runtime has the calls that
nvvl makes and computes with onnxruntime on the graph the engine was built from, reading and writing
memory by the addresses it is given.
"""

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

__version__ = "11.4.0.fake"

NetworkDefinitionCreationFlag = SimpleNamespace()
LayerType = SimpleNamespace(ATTENTION_INPUT="attention")
BuilderFlag = SimpleNamespace(WEIGHT_STREAMING="weight_streaming")


TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
DataType = SimpleNamespace(FLOAT="FLOAT", BF16="BF16", FP8="FP8", INT64="INT64")


class ILogger:
    Severity = SimpleNamespace(INFO=3, ERROR=1)


class IStreamWriter:
    pass


class IProgressMonitor:
    pass


class Network:
    num_layers = 0

    def __init__(self, flags: int) -> None:
        self.inputs: list[SimpleNamespace] = []
        self.name = self.path = ""

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, number: int) -> SimpleNamespace:
        return self.inputs[number]


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        graph = onnx.load(path, load_external_data=False).graph
        self.network.name, self.network.path = graph.name, path
        self.network.inputs = [SimpleNamespace(name=value.name) for value in graph.input]
        return True


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Config:
    progress_monitor: Any = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self.profile: Any = None
        self.cache = TimingCache(b"")

    def add_optimization_profile(self, profile: "Profile") -> None:
        self.profile = profile

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, *, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache.data != b"of another GPU"

    def get_timing_cache(self) -> TimingCache:
        return self.cache


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.shapes[name] = [low, usual, high]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network_to_stream(
        self, network: Network, config: Config, writer: Any
    ) -> bool:
        config.cache.data += b"+" + network.name.encode()
        built = {
            "graph": network.path,
            "profile": config.profile.shapes,
            "num_targets": config.num_compute_capabilities,
        }
        writer.write(json.dumps(built).encode())
        return True


class Logger(ILogger):
    WARNING = 2

    def __init__(self, severity: int) -> None:
        self.severity = severity


class Runtime:
    def __init__(self, logger: Logger) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
        try:
            return Engine(json.loads(data)["graph"])
        except ValueError:
            return None


class Engine:
    streamable_weights_size = 0
    weight_streaming_budget_v2: int | None = None

    def __init__(self, graph: str) -> None:
        self.session = onnxruntime.InferenceSession(graph)
        model = onnx.load(graph, load_external_data=False).graph
        self.ports = {value.name: value.type.tensor_type for value in (*model.input, *model.output)}
        self.inputs = {value.name for value in model.input}

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, number: int) -> str:
        return list(self.ports)[number]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return str(onnx.TensorProto.DataType.Name(self.ports[name].elem_type))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if dim.dim_param else dim.dim_value for dim in self.ports[name].shape.dim)

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def create_execution_context(self) -> "Context | None":
        return Context(self)


class Context:
    num_launches = 0

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name}: no address"
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for given, shape in self.shapes.items():
            dims = self.engine.ports[given].shape.dim
            sizes |= {d.dim_param: n for d, n in zip(dims, shape, strict=True) if d.dim_param}
        sizes["all_tokens"] = sizes.get("past_tokens", 0) + sizes.get("tokens", 1)
        return tuple(
            sizes[dim.dim_param] if dim.dim_param else dim.dim_value
            for dim in self.engine.ports[name].shape.dim
        )

    def execute_async_v3(self, stream: int) -> bool:
        Context.num_launches += 1
        fed = {name: self._memory(name) for name in self.engine.inputs}
        names = [name for name in self.engine.ports if name not in self.engine.inputs]
        for name, value in zip(names, self.engine.session.run(names, fed), strict=True):
            self._memory(name)[...] = value
        return True

    def _memory(self, name: str) -> Any:
        shape = self.shapes.get(name) or self.get_tensor_shape(name)
        kind = ctypes.c_int64 if self.engine.get_tensor_dtype(name) == "INT64" else ctypes.c_float
        count = int(np.prod(shape))
        flat = np.ctypeslib.as_array((kind * count).from_address(self.addresses[name]))
        return flat.reshape(shape)
