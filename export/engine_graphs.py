"""A folder of ONNX graphs as a builder needs it: inputs, precisions and bytes of weights.

``io.json`` says which graphs there are and how far their dimensions go. The rest is read from the
graphs themselves, without their weights, so that a graph of any size answers at once and what is
said about it cannot differ from what would be built.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from nvvl.errors import EngineError
from nvvl.export.engine_targets import Precision
from nvvl.export.onnx_export import read_manifest
from nvvl.export.onnx_io import IO_NAME, read_io
from nvvl.model.hashing import changed_files

# A dimension is a number, or the word of a dynamic one.
Dimension = int | str

_PRECISIONS: Mapping[int, Precision] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "nvfp4",
}
_ELEMENT_BITS: Mapping[int, int] = {
    TensorProto.INT64: 64,
    TensorProto.FLOAT: 32,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT4E2M1: 4,
}


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """One ONNX graph.

    Attributes:
        path: The file; its external data lies beside it.
        inputs: Dimensions of each input, by name.
        weights: Bytes of each initializer, by name.
        precisions: That the hardware must have.
        data_files: Names of its external data files.
    """

    path: Path
    inputs: Mapping[str, tuple[Dimension, ...]]
    weights: Mapping[str, int]
    precisions: frozenset[Precision]
    data_files: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(self.weights.values())

    @property
    def symbols(self) -> frozenset[str]:
        """Words of its dynamic dimensions."""
        return frozenset(d for shape in self.inputs.values() for d in shape if isinstance(d, str))


@dataclass(frozen=True, kw_only=True)
class GraphSet:
    """The graphs of one folder.

    Attributes:
        folder: Where they lie.
        io: Content of ``io.json``.
        manifest: Content of ``manifest.json``.
        infos: What there is to know of each graph, by name.
    """

    folder: Path
    io: dict[str, Any]
    manifest: Mapping[str, Any]
    infos: Mapping[str, GraphInfo]

    @property
    def precisions(self) -> frozenset[Precision]:
        """Precisions of all graphs."""
        return frozenset().union(*(info.precisions for info in self.infos.values()))

    def hash_of(self, name: str) -> dict[str, str]:
        """Return the recorded SHA-256 of a graph's files, by file name."""
        info = self.infos[name]
        files: Mapping[str, str] = self.manifest["files"]
        return {file: files[file] for file in (info.path.name, *info.data_files)}

    def require_unchanged(self) -> None:
        """Refuse files that are not those the manifest records.

        Raises:
            EngineError: naming each of them.
        """
        recorded: Mapping[str, str] = self.manifest["files"]
        _require_hashes(self.folder, recorded)

    def side_files(self) -> list[Path]:
        """List the files that are needed beside engines: config, tokenizer, embedding."""
        graph_files = {IO_NAME, "recipe.json"}
        for info in self.infos.values():
            graph_files |= {info.path.name, *info.data_files}
        files: Mapping[str, str] = self.manifest["files"]
        return [self.folder / name for name in sorted(files.keys() - graph_files)]


def open_graphs(folder: Path) -> GraphSet:
    """Read what there is to know of a folder of graphs; weights are not read.

    Raises:
        EngineError: if it is not a folder that ``nvvl export onnx`` wrote, or a graph was altered.
    """
    io = read_io(folder)
    manifest = read_manifest(folder)
    small = (IO_NAME, *(entry["file"] for entry in io["graphs"].values()))
    _require_hashes(folder, {name: manifest["files"].get(name, "") for name in small})
    infos = {name: read_graph(folder / entry["file"]) for name, entry in io["graphs"].items()}
    return GraphSet(folder=folder, io=io, manifest=manifest, infos=infos)


def read_graph(path: Path) -> GraphInfo:
    """Read what there is to know of a graph, without its weights."""
    model = onnx.load(path, load_external_data=False)
    weights = model.graph.initializer
    data_files = tuple(sorted({_location(tensor) for tensor in weights} - {""}))
    return GraphInfo(
        path=path,
        inputs={
            value.name: tuple(
                dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim
            )
            for value in model.graph.input
        },
        weights={tensor.name: _count_bytes(tensor) for tensor in weights},
        precisions=_find_precisions(model),
        data_files=data_files,
    )


def _require_hashes(folder: Path, recorded: Mapping[str, str]) -> None:
    changed = changed_files(folder, recorded)
    if changed:
        raise EngineError(
            f"{folder}: {', '.join(changed)}: changed or lost since the graphs were written; "
            "export them again"
        )


def _count_bytes(tensor: TensorProto) -> int:
    return (math.prod(tensor.dims) * _ELEMENT_BITS[tensor.data_type] + 7) // 8


def _location(tensor: TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _find_precisions(model: onnx.ModelProto) -> frozenset[Precision]:
    """Take every type that a weight, an input or output, or a conversion has."""
    graph = model.graph
    found = {tensor.data_type for tensor in graph.initializer}
    found |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    for node in graph.node:
        found |= {a.i for a in node.attribute if a.name in ("to", "output_dtype")}
    return frozenset(_PRECISIONS[kind] for kind in found if kind in _PRECISIONS)
