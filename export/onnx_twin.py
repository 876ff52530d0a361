"""A twin of a graph that onnxruntime's CPU provider can run: the same computation in float32.

That provider has kernels for FP8 QuantizeLinear and DequantizeLinear, but none for FP4 tensors,
TensorRT's dynamic quantization, or most of BF16. The twin is made from the graph itself, node by
node, so what it proves holds of the graph:

* BF16 becomes float32: values, casts, weights. A graph that is float32 already keeps its nodes.
* A weight of FP4 codes is decoded (`nvvl.export.codes`, the proof's own decoder).
* Dynamic quantization becomes standard operators: largest magnitude of each block of 16, its E4M3
  scale by a cast to FP8 and back, E2M1 by rounding to steps of 0.5, 1 or 2 with ties to even.
* Keys and values kept as FP8 become float32 values of the same codes.

FP8 weights and activations stay as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nvvl.errors import EngineError
from nvvl.export import codes
from nvvl.export.onnx_linear import DYNAMIC_QUANTIZE

# Dequantized inputs of quantized linears get outputs with this in front, where they are asked for.
INPUT_OUTPUT = "input_of."


class Twin:
    """A graph being rewritten; `make_twin` is the way in."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._new_nodes: list[NodeProto] = []

    def rewrite(self) -> None:
        """Rewrite all nodes, then all types."""
        for node in self.model.graph.node:
            if node.op_type == DYNAMIC_QUANTIZE:
                continue
            if node.op_type == "DequantizeLinear":
                self._rewrite_dequantize(node)
            elif node.op_type == "QuantizeLinear" and not self._feeds_dequantize(node):
                codes_name = f"{node.output[0]}/codes"
                self._add("Cast", [codes_name], node.output[0], to=TensorProto.FLOAT)
                self._new_nodes[-1:-1] = [_renamed_output(node, codes_name)]
            else:
                self._new_nodes.append(node)
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self._new_nodes)
        self._drop_unused()
        _widen(self.model)
        kept = [opset for opset in self.model.opset_import if not opset.domain]
        del self.model.opset_import[:]
        self.model.opset_import.extend(kept)

    def _rewrite_dequantize(self, node: NodeProto) -> None:
        source = node.input[0]
        if source in self._weights and self._weights[source].data_type == TensorProto.FLOAT4E2M1:
            self._decode_weight(node)
            return
        maker = self._makers.get(source)
        if maker is None and source not in self._weights:
            self._add("Mul", list(node.input), node.output[0])  # FP8 keys and values come in
        elif maker is not None and maker.op_type == DYNAMIC_QUANTIZE:
            # that of the block scales is part of what stands for the one of the codes
            if source == maker.output[0]:
                self._expand_dynamic(maker, node.output[0])
        elif maker is not None and maker.op_type not in ("QuantizeLinear", DYNAMIC_QUANTIZE):
            self._add("Mul", list(node.input), node.output[0])  # FP8 keys and values, extended
        else:
            self._new_nodes.append(node)

    def _decode_weight(self, node: NodeProto) -> None:
        packed = self._weights[node.input[0]]
        of_scales = self._makers[node.input[1]]
        block_scale = self._weights[of_scales.input[0]]
        rows, columns = packed.dims
        weight = codes.decode_nvfp4(
            _bytes_of(packed).reshape(rows, columns // 2),
            _bytes_of(block_scale).view(torch.float8_e4m3fn).reshape(tuple(block_scale.dims)),
            self._scalar(of_scales.input[1]),
        )
        self._set_weight(node.output[0], weight.numpy())

    def _expand_dynamic(self, node: NodeProto, result: str) -> None:
        """Add nodes that quantize and dequantize an input as ``nvvl.quantize.nvfp4`` does."""
        x, scale = node.input[0], np.float32(self._scalar(node.input[1]))
        at = f"{node.name}/twin"

        def add(op_type: str, *inputs: str, **attributes: Any) -> str:
            name = f"{at}/{len(self._new_nodes)}"
            self._add(op_type, list(inputs), name, **attributes)
            return name

        def number(value: float | np.float32) -> str:
            return self._constant(np.asarray(value, np.float32))

        shape = add("Shape", x)
        blocks = add("Reshape", x, self._constant(np.array([-1, codes.BLOCK_SIZE], np.int64)))
        last = self._constant(np.array([-1], np.int64))
        largest = add("ReduceMax", add("Abs", blocks), last, keepdims=1)
        quotient = add("Div", largest, number(np.float32(6) * scale))
        quotient = add("Where", add("Equal", quotient, number(0)), number(1), quotient)
        quotient = add("Min", add("Max", quotient, number(2.0**-9)), number(codes.E4M3_MAX))
        block_scale = add("Cast", quotient, to=TensorProto.FLOAT8E4M3FN)
        block_scale = add("Cast", block_scale, to=TensorProto.FLOAT)
        unit = add("Mul", block_scale, number(scale))
        y = add("Div", blocks, unit)
        magnitude = add("Min", add("Abs", y), number(6))
        step = add("Where", add("Less", magnitude, number(4)), number(1), number(2))
        step = add("Where", add("Less", magnitude, number(2)), number(0.5), step)
        rounded = add("Mul", add("Round", add("Div", magnitude, step)), step)
        values = add("Mul", add("Mul", add("Sign", y), rounded), unit)
        self._add("Reshape", [values, shape], result)

    def _scalar(self, name: str) -> float:
        """Return a tensor scale; a Cast may stand before it."""
        tensor = self._weights.get(name) or self._weights[self._makers[name].input[0]]
        return float(numpy_helper.to_array(tensor))

    def _feeds_dequantize(self, node: NodeProto) -> bool:
        return any(
            other.op_type == "DequantizeLinear" and other.input[0] == node.output[0]
            for other in self.model.graph.node
        )

    def _add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> None:
        node = helper.make_node(op_type, inputs, [output], name=f"{output}/node", **attributes)
        self._new_nodes.append(node)

    def _constant(self, value: np.ndarray) -> str:
        name = f"constants/twin/{value.dtype}{value.tolist()}"
        if name not in self._weights:
            self._set_weight(name, value)
        return name

    def _set_weight(self, name: str, value: np.ndarray) -> None:
        tensor = numpy_helper.from_array(value, name)
        self.model.graph.initializer.append(tensor)
        self._weights[name] = tensor

    def _drop_unused(self) -> None:
        graph = self.model.graph
        used = {name for node in graph.node for name in node.input}
        used |= {output.name for output in graph.output}
        nodes = [node for node in graph.node if any(name in used for name in node.output)]
        if len(nodes) < len(graph.node):
            del graph.node[:]
            graph.node.extend(nodes)
            self._drop_unused()
            return
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def make_twin(path: Path, *, expose_inputs: bool = False) -> ModelProto:
    """Read a graph and rewrite it.

    Args:
        path: an ONNX file that nvvl wrote, its data beside it.
        expose_inputs: whether the quantized and dequantized inputs of quantized linears become
            outputs, called ``input_of.`` and the name of the linear.

    Raises:
        EngineError: if it cannot be read.
    """
    try:
        model = onnx.load(path)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read as an ONNX graph ({error})") from None
    inputs = quantized_inputs(model) if expose_inputs else {}
    if needs_twin(model):
        Twin(model).rewrite()
    for fqn, value in inputs.items():
        name = f"{INPUT_OUTPUT}{fqn}"
        model.graph.node.append(helper.make_node("Identity", [value], [name], name=name))
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        model.graph.output.append(info)
    return model


def needs_twin(model: ModelProto) -> bool:
    """Whether onnxruntime's CPU provider lacks kernels for a graph as it is."""
    if any(node.op_type == DYNAMIC_QUANTIZE for node in model.graph.node):
        return True
    narrow = (TensorProto.BFLOAT16, TensorProto.FLOAT4E2M1)
    if any(tensor.data_type in narrow for tensor in model.graph.initializer):
        return True
    values = [*model.graph.input, *model.graph.output]
    return any(value.type.tensor_type.elem_type == TensorProto.FLOAT8E4M3FN for value in values)


def quantized_inputs(model: ModelProto) -> dict[str, str]:
    """Return the dequantized input of each linear whose input is quantized, by module name."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "MatMul" else None
        if maker is not None and maker.op_type == "DequantizeLinear":
            found[node.name.rpartition("/")[0]] = node.input[0]
    return found


def _bytes_of(tensor: TensorProto) -> torch.Tensor:
    return torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8)


def _renamed_output(node: NodeProto, name: str) -> NodeProto:
    renamed = NodeProto()
    renamed.CopyFrom(node)
    renamed.output[0] = name
    return renamed


_WIDENED: Mapping[int, int] = {
    TensorProto.BFLOAT16: TensorProto.FLOAT,
    TensorProto.FLOAT8E4M3FN: TensorProto.FLOAT,
}


def _widen(model: ModelProto) -> None:
    """Turn BF16 into float32 throughout, and FP8 inputs and outputs of the graph."""
    graph = model.graph
    for value in [*graph.input, *graph.output]:
        kind = value.type.tensor_type
        kind.elem_type = _WIDENED.get(kind.elem_type, kind.elem_type)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            tensor.raw_data = wide.tobytes()
            tensor.data_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
