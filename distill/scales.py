"""Fake quantization with straight-through gradients, and the gradient of a learned input scale.

The rounding itself is that of the packed format (``nvvl.quantize``); its gradient with respect to
``x`` is the identity, without a clip mask. Where the scale trains, its gradient is that of learned
step sizes (LSQ, arXiv 1902.08153): with step ``s`` and values ``q = x / s`` rounded to ``r``,

    d (r s) / d s = r - q     where q lies in the format's range,     r     where it is clipped.

FP8 has one step, the scale. NVFP4 has one a block, ``e4m3(amax / (6 S)) S`` with the tensor scale
``S``, the number that is learned. Through the block scale, its own rounding straight-through,

    d step / d S = (step - amax / 6) / S     or     step / S     where the block scale saturates.

So NVFP4 hardly feels ``S`` except where blocks saturate: a scale that is too small is felt, one
that is too large only where block scales become subnormal.
"""

from typing import Any

import torch
from torch import Tensor

from nvvl.quantize import nvfp4, rounding
from nvvl.quantize.formats import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_MIN_POSITIVE
from nvvl.quantize.pack import input_scale
from nvvl.quantize.recipe import Format


def fake_quantize(x: Tensor, scale: Tensor, linear_format: Format) -> Tensor:
    """Round ``x`` (..., K) to a format, with gradients for ``x`` and, if it trains, ``scale``."""
    rounded: Tensor = _FakeQuantize.apply(x, scale, linear_format)  # type: ignore[no-untyped-call]
    return rounded


def round_weight(weight: Tensor, linear_format: Format, amax: Tensor) -> Tensor:
    """Round a weight (..., K) to a format as it will be packed, without a gradient.

    Args:
        weight: BF16, the whole of it or rows.
        linear_format: Any format but ``bf16``.
        amax: FP32 scalar on the CPU, of the whole weight.

    Returns:
        BF16 of the weight's shape.
    """
    return rounding.fake_quantize(weight, input_scale(linear_format, amax), linear_format)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, linear_format: Format) -> Tensor:
        rounded = rounding.fake_quantize(x, scale, linear_format)
        ctx.linear_format = linear_format
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, rounded, scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        scale_gradient = None
        if ctx.needs_input_grad[1]:
            x, rounded, scale = ctx.saved_tensors
            slope = scale_slope(x, rounded, scale, ctx.linear_format)
            scale_gradient = (slope * gradients[0].float()).sum().to(scale.device).view_as(scale)
        return gradients[0], scale_gradient, None


def scale_slope(x: Tensor, rounded: Tensor, scale: Tensor, linear_format: Format) -> Tensor:
    """Return d rounded / d scale of each element, float32 of x's shape.

    Args:
        x: What was rounded.
        rounded: What it was rounded to.
        scale: FP32 scalar: FP8's scale, NVFP4's tensor scale.
        linear_format: The format.
    """
    wide, rounded, step = x.float(), rounded.float(), scale.to(x.device)
    if linear_format == "fp8":
        inside = wide.abs() <= E4M3_MAX * step
        return torch.where(inside, rounded - wide, rounded) / step
    return _nvfp4_slope(wide, rounded, nvfp4.quantize(x, scale)[1].float(), step)


def _nvfp4_slope(x: Tensor, rounded: Tensor, block_scales: Tensor, scale: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    ideal = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX
    codes = (ideal / scale).clamp(max=E4M3_MAX)
    step = block_scales.unsqueeze(-1) * scale
    is_free = (codes < E4M3_MAX) & (codes > E4M3_MIN_POSITIVE)  # else the block scale is clamped
    step_slope = torch.where(is_free, step - ideal, step) / scale
    values = rounded.unflatten(-1, (-1, BLOCK_SIZE))
    inside = blocks.abs() <= E2M1_MAX * step
    slope = torch.where(inside, values - blocks, values) / step * step_slope
    return slope.flatten(-2)
