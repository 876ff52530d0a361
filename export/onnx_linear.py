"""A linear layer in a graph, in each format, with the weight stored as the checkpoint stores it.

    bf16          MatMul(x, W^T)
    fp8           x and W through QuantizeLinear / DequantizeLinear, W as E4M3 codes
    nvfp4         W as E2M1 codes with E4M3 block scales: DequantizeLinear of the block scales by
                  the tensor scale, then of the codes by that, in blocks of 16. The input through
                  TensorRT's dynamic quantization, which finds block scales on the fly, and the
                  same two DequantizeLinear
    nvfp4-w4a16   as nvfp4, the input as it is

Builders recognize these patterns and compute on the codes. Tensor scales are float32 in the graph,
as in the checkpoint; where activations are BF16 a Cast shows the rounding that builders ask for.
"""

from onnx import TensorProto

from nvvl.export.onnx_graph import TRT_DOMAIN, Graph
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.quantize.formats import BLOCK_SIZE

DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


def linear(g: Graph, weights: CheckpointWeights, fqn: str, x: str, *, bias: bool = False) -> str:
    """Emit ``x W^T (+ bias)``.

    Args:
        g: the graph.
        weights: the checkpoint's tensors.
        fqn: name of the linear.
        x: (..., K) in the graph's dtype.
        bias: whether it has one.

    Returns:
        (..., N) in the graph's dtype.
    """
    linear_format = weights.format_of(fqn)
    if linear_format == "fp8":
        x = _fp8_input(g, weights, fqn, x)
    elif linear_format == "nvfp4":
        x = _nvfp4_input(g, weights, fqn, x)
    weight = _weight(g, weights, fqn)
    y = g.op("MatMul", x, g.transpose(weight, (1, 0), at=fqn), at=fqn)
    if bias:
        name = f"{fqn}.bias"
        y = g.op("Add", y, g.weight(name, weights.graph), at=fqn)
    return y


def scale(g: Graph, weights: CheckpointWeights, name: str) -> str:
    """Use a tensor scale in the graph's dtype."""
    value = g.weight(name, weights.scale)
    return g.shared(("scale", name), lambda: g.to_graph(value, at=name))


def _weight(g: Graph, weights: CheckpointWeights, fqn: str) -> str:
    name, linear_format = f"{fqn}.weight", weights.format_of(fqn)
    if linear_format == "bf16":
        return g.weight(name, weights.graph)
    codes = g.weight(name, weights.stored)
    if linear_format == "fp8":
        tensor_scale = scale(g, weights, f"{fqn}.weight_scale")
        return g.op("DequantizeLinear", codes, tensor_scale, at=name)
    block_name = f"{fqn}.weight_scale"
    block_codes = g.weight(block_name, weights.stored)
    tensor_scale = scale(g, weights, f"{fqn}.weight_scale_2")
    block_scale = g.op("DequantizeLinear", block_codes, tensor_scale, at=block_name)
    return g.op("DequantizeLinear", codes, block_scale, at=name, axis=-1, block_size=BLOCK_SIZE)


def _fp8_input(g: Graph, weights: CheckpointWeights, fqn: str, x: str) -> str:
    at = f"{fqn}.input"
    value = float(weights.scale(f"{fqn}.input_scale"))

    def build() -> str:
        input_scale = scale(g, weights, f"{fqn}.input_scale")
        codes = g.op("QuantizeLinear", x, input_scale, at=at, output_dtype=TensorProto.FLOAT8E4M3FN)
        return g.op("DequantizeLinear", codes, input_scale, at=at)

    # q, k and v have one input and one scale
    return g.shared(("fp8 input", x, value), build)


def _nvfp4_input(g: Graph, weights: CheckpointWeights, fqn: str, x: str) -> str:
    at = f"{fqn}.input"
    value = float(weights.scale(f"{fqn}.input_scale"))

    def build() -> str:
        input_scale = scale(g, weights, f"{fqn}.input_scale")
        codes, block_codes = g.ops(
            DYNAMIC_QUANTIZE,
            x,
            f"{fqn}.input_scale",
            at=at,
            num_outputs=2,
            domain=TRT_DOMAIN,
            axis=-1,
            block_size=BLOCK_SIZE,
            scale_type=TensorProto.FLOAT8E4M3FN,
        )
        block_scale = g.op("DequantizeLinear", block_codes, input_scale, at=f"{at}_scale")
        return g.op("DequantizeLinear", codes, block_scale, at=at, axis=-1, block_size=BLOCK_SIZE)

    return g.shared(("nvfp4 input", x, value), build)
