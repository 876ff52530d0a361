"""Which tensors a quantized checkpoint holds: names, dtypes and shapes, known before any is made.

A quantized linear ``X`` replaces ``X.weight`` by the tensors below; every other tensor of the
source is there byte for byte. Because all of it follows from headers and formats, a checkpoint can
be written as a stream, and a plan can state its exact size.

    fp8           weight F8_E4M3 (N, K)   weight_scale F32 ()              input_scale F32 ()
    nvfp4         weight U8 (N, K/2)      weight_scale F8_E4M3 (N, K/16)
                  weight_scale_2 F32 ()   input_scale F32 ()
    nvfp4-w4a16   as nvfp4, without input_scale

and, read from other tools but never written,

    fp8-per-channel   weight F8_E4M3 (N, K)   weight_scale F32 (N,)

A ``scale`` multiplies codes back to values. Block scales are stored row-major, not swizzled.
Layout: ModelOpt's unified Hugging Face export, as vLLM and TensorRT-LLM read it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import LinearShape

StoredFormat = Format | Literal["fp8-per-channel"]


def linear_tensors(fqn: str, shape: LinearShape, linear_format: StoredFormat) -> list[TensorSpec]:
    """List the tensors of one quantized linear, weight first.

    Args:
        fqn: Name of the linear.
        shape: (out_features, in_features).
        linear_format: Any format but ``bf16``.

    Raises:
        ValueError: for ``bf16``, whose tensors are the source's.
    """
    rows, columns = shape
    if linear_format == "fp8":
        return [
            TensorSpec(f"{fqn}.weight", "F8_E4M3", (rows, columns)),
            TensorSpec(f"{fqn}.weight_scale", "F32", ()),
            TensorSpec(f"{fqn}.input_scale", "F32", ()),
        ]
    if linear_format == "fp8-per-channel":
        return [
            TensorSpec(f"{fqn}.weight", "F8_E4M3", (rows, columns)),
            TensorSpec(f"{fqn}.weight_scale", "F32", (rows,)),
        ]
    if linear_format == "bf16":
        raise ValueError(f"{fqn}: bf16 is not a quantized format")
    tensors = [
        TensorSpec(f"{fqn}.weight", "U8", (rows, columns // 2)),
        TensorSpec(f"{fqn}.weight_scale", "F8_E4M3", (rows, columns // BLOCK_SIZE)),
        TensorSpec(f"{fqn}.weight_scale_2", "F32", ()),
    ]
    if linear_format == "nvfp4":
        tensors.append(TensorSpec(f"{fqn}.input_scale", "F32", ()))
    return tensors


def build_layout(source: Checkpoint, formats: Mapping[str, Format]) -> list[TensorSpec]:
    """List every tensor of the quantized checkpoint, in the order the source stores them.

    Args:
        source: The BF16 checkpoint.
        formats: Format of each quantizable linear.
    """
    return replace_linears(source.in_file_order(), formats)


def replace_linears(
    source: Sequence[TensorSpec], formats: Mapping[str, Format]
) -> list[TensorSpec]:
    """Put the tensors of quantized linears in the place of their BF16 weights.

    Args:
        source: Every tensor of the BF16 checkpoint.
        formats: Format of each quantizable linear.
    """
    layout: list[TensorSpec] = []
    for info in source:
        fqn = info.name.removesuffix(".weight")
        linear_format = formats.get(fqn, "bf16")
        if linear_format == "bf16":
            layout.append(TensorSpec(info.name, info.dtype, info.shape))
        else:
            rows, columns = info.shape
            layout += linear_tensors(fqn, (rows, columns), linear_format)
    return layout
