"""Stands in for the package ``tensorrt``, which needs a GPU: the calls nvvl makes, recorded."""

import json
from types import SimpleNamespace
from typing import Any

import onnx

__version__ = "11.4.0.fake"

NetworkDefinitionCreationFlag = SimpleNamespace()
LayerType = SimpleNamespace(ATTENTION_INPUT="attention")
BuilderFlag = SimpleNamespace(WEIGHT_STREAMING="weight_streaming")


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
        self.name = ""

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
        self.network.name = graph.name
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

    def set_timing_cache(self, cache: TimingCache, *, ignore_mismatch: bool) -> None:
        self.cache = cache

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
        built = {"profile": config.profile.shapes, "num_targets": config.num_compute_capabilities}
        writer.write(json.dumps(built).encode())
        return True
