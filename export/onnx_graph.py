"""Builds one ONNX graph, node by node, with names that follow the modules.

A node is called after the module it belongs to and its operator, as in
``language_model.backbone.layers.3.mixer.q_proj/MatMul``, and so is what it gives; initializers
have the names of the checkpoint's tensors. Opset 23 is the first with FP4 tensors, and
the one that TensorRT's parsers take. The one node from outside the standard is TensorRT's
``TRT_FP4DynamicQuantize`` (`nvvl.export.onnx_linear`).

The graph's dtype is that of activations and products. Where the network in ``model/`` computes in
float32 whatever the dtype (norms, time steps, states), so does the graph.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

import nvvl
from nvvl.export.onnx_data import DataFile, inline_tensor

OPSET = 23
IR_VERSION = 11
TRT_DOMAIN = "trt"

# As the end of a slice: however long the value is.
TO_END = 2**31 - 1

GraphDtype = Literal["f32", "bf16"]
Dim = int | str

ONNX_DTYPES = {
    "f32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int64": TensorProto.INT64,
}
TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: name, dtype (a key of ``ONNX_DTYPES``) and dimensions."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


class Graph:
    """An ONNX graph while it is built.

    Attributes:
        dtype: Of activations and products, ``f32`` or ``bf16``.
        data: Where large initializers go.
        inputs: Declared so far, in order.
        outputs: Declared so far, in order.
    """

    def __init__(self, name: str, dtype: GraphDtype, data: DataFile) -> None:
        self.name = name
        self.dtype: GraphDtype = dtype
        self.data = data
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._names: Counter[str] = Counter()
        self._shared: dict[object, Any] = {}

    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> str:
        """Declare an input and return its name."""
        self.inputs.append(Port(name, dtype, tuple(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[Dim], *, at: str) -> None:
        """Declare that a value is an output called ``name``."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{at}/{name}"))
        self.outputs.append(Port(name, dtype, tuple(shape)))

    def op(self, op_type: str, *inputs: str, at: str, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            op_type: the operator.
            inputs: names of values; "" for an optional input that is left out.
            at: the module, or part of it, that the node belongs to.
            attributes: of the node.

        Returns:
            The name of what it gives, which is the node's own.
        """
        return self.ops(op_type, *inputs, at=at, num_outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, at: str, num_outputs: int, domain: str = "", **attrs: Any
    ) -> list[str]:
        """Add a node with several outputs and return their names; otherwise as `op`."""
        base = f"{at}/{op_type}"
        count = self._names[base]
        self._names[base] += 1
        name = f"{base}_{count}" if count else base
        outputs = [name] if num_outputs == 1 else [f"{name}.{i}" for i in range(num_outputs)]
        node = helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attrs)
        self._nodes.append(node)
        return outputs

    def weight(self, name: str, load: Callable[[str], Tensor]) -> str:
        """Use an initializer that lies in the data file, where it is written at its first use.

        Args:
            name: its name.
            load: gives the tensor of that name; called once for all graphs that share the file.
        """
        if name not in self._initializers:
            self._initializers[name] = self.data.find(name) or self.data.add(name, load(name))
        return name

    def constant(self, values: Sequence[int] | int | float | Tensor, dtype: str = "f32") -> str:
        """Use a small constant: integers are int64, a float has ``dtype``.

        Args:
            values: an int (a scalar), a list of int (a vector), a float (a scalar), or a tensor.
            dtype: of a float: ``f32``, ``bf16``, or ``graph`` for the graph's own.
        """
        if isinstance(values, Tensor):
            tensor = values
        elif isinstance(values, float):
            wanted = self.dtype if dtype == "graph" else dtype
            tensor = torch.tensor(values, dtype=TORCH_DTYPES[wanted])
        else:
            tensor = torch.tensor(values, dtype=torch.int64)
        kind = str(tensor.dtype).removeprefix("torch.")
        shown = str(tensor.tolist()).replace(" ", "") if tensor.numel() < 16 else ""
        name = f"constants/{kind}{shown or list(tensor.shape)}"
        self._initializers.setdefault(name, inline_tensor(name, tensor))
        return name

    def shared(self, key: object, build: Callable[[], Any]) -> Any:
        """Return what ``build`` gives for a key, built once in this graph."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def to_float(self, value: str, *, at: str) -> str:
        """Convert a value of the graph's dtype to float32."""
        return value if self.dtype == "f32" else self.op("Cast", value, at=at, to=TensorProto.FLOAT)

    def to_graph(self, value: str, *, at: str) -> str:
        """Convert a float32 value to the graph's dtype."""
        if self.dtype == "f32":
            return value
        return self.op("Cast", value, at=at, to=ONNX_DTYPES[self.dtype])

    def reshape(self, value: str, shape: Sequence[int], *, at: str) -> str:
        """Reshape; 0 keeps a dimension and -1 takes what is left."""
        return self.op("Reshape", value, self.constant(list(shape)), at=at)

    def transpose(self, value: str, order: Sequence[int], *, at: str) -> str:
        """Permute dimensions."""
        return self.op("Transpose", value, at=at, perm=list(order))

    def unsqueeze(self, value: str, axis: int, *, at: str) -> str:
        """Add a dimension of size 1."""
        return self.op("Unsqueeze", value, self.constant([axis]), at=at)

    def split(self, value: str, sizes: Sequence[int], *, at: str, axis: int = -1) -> list[str]:
        """Split along an axis."""
        sizes_name = self.constant(list(sizes))
        return self.ops("Split", value, sizes_name, at=at, num_outputs=len(sizes), axis=axis)

    def slice(self, value: str, start: int, end: int | str, axis: int, *, at: str) -> str:
        """Take a range along an axis; ``end`` may be the name of an int64 vector of one."""
        end_name = end if isinstance(end, str) else self.constant([end])
        axis_name = self.constant([axis])
        return self.op("Slice", value, self.constant([start]), end_name, axis_name, at=at)

    def dim(self, value: str, axis: int, *, at: str) -> str:
        """Return one dimension of a value as an int64 vector of one."""
        return self.op("Shape", value, at=at, start=axis, end=axis + 1)

    def scalar(self, vector: str, *, at: str) -> str:
        """Turn a vector of one into a scalar."""
        return self.op("Squeeze", vector, self.constant([0]), at=at)

    def to_model(self) -> ModelProto:
        """Return the finished model; its large tensors are references into the data file."""
        graph = GraphProto(name=self.name, node=self._nodes)
        graph.input.extend(_value_info(port) for port in self.inputs)
        graph.output.extend(_value_info(port) for port in self.outputs)
        graph.initializer.extend(self._initializers.values())
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == TRT_DOMAIN for node in self._nodes):
            opsets.append(helper.make_opsetid(TRT_DOMAIN, 1))
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="nvvl",
            producer_version=nvvl.__version__,
        )


def _value_info(port: Port) -> ValueInfoProto:
    return helper.make_tensor_value_info(port.name, ONNX_DTYPES[port.dtype], port.shape)
