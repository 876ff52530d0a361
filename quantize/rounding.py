"""Rounding to whichever format a linear has, with one scale: that of FP8, the tensor's of NVFP4."""

from torch import Tensor

from nvvl.quantize import fp8, nvfp4


def fake_quantize(x: Tensor, scale: Tensor, linear_format: str) -> Tensor:
    """Round to a format and back.

    Args:
        x: bfloat16, float16 or float32, (..., K) with K a multiple of 16 for NVFP4.
        scale: FP32 scalar; `nvvl.quantize.pack.input_scale` makes it of an amax.
        linear_format: ``fp8``, ``nvfp4`` or ``nvfp4-w4a16``.

    Returns:
        Of x's shape and dtype, without gradient.

    Raises:
        ValueError: for any other format, and as `nvvl.quantize.fp8.fake_quantize` and
            `nvvl.quantize.nvfp4.fake_quantize`.
    """
    if linear_format == "fp8":
        return fp8.fake_quantize(x, scale)
    if linear_format in ("nvfp4", "nvfp4-w4a16"):
        return nvfp4.fake_quantize(x, scale)
    raise ValueError(f"{linear_format} is not a quantized format")
