"""The two number formats nvvl writes, as constants: FP8 (E4M3) and NVFP4 (E2M1 in blocks).

**E4M3** (``torch.float8_e4m3fn``): 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinities,
NaN = 0x7F and 0xFF, largest value 448, smallest positive value 2**-9 (subnormal).

**E2M1**: 1 sign, 2 exponent (bias 1), 1 mantissa bit; the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 are
codes 0 to 7, bit 3 is the sign. There is no NaN and no infinity.

**NVFP4** stores ``x ~ code_value * block_scale * tensor_scale``: E2M1 codes, an E4M3
``block_scale`` for every 16 neighbours along the last dimension, and one FP32 ``tensor_scale`` =
amax / (6 * 448), which makes the block that holds the amax use E4M3's largest value.

On disk (the unified Hugging Face layout that ModelOpt writes and servers read):

* FP8: ``weight`` float8_e4m3fn (M, K); ``weight_scale`` FP32 scalar = amax / 448.
* NVFP4: ``weight`` uint8 (M, K / 2), the element of even index in the low nibble;
  ``weight_scale`` float8_e4m3fn (M, K / 16), row-major and not swizzled;
  ``weight_scale_2`` FP32 scalar, the tensor scale.

Sources: OCP 8-bit Floating Point Specification (E4M3) and OCP Microscaling Formats Specification
v1.0, section 5.3.3 (E2M1); the layout and rounding of ModelOpt 0.47's ``NVFP4QTensor`` and
``FP8QTensor``, with which the tests compare bit by bit.

This file holds no arithmetic on tensors (`nvvl.quantize.fp8`, `nvvl.quantize.nvfp4`) and does not
import torch.
"""

import math
from typing import TYPE_CHECKING

from nvvl.errors import CalibrationError

if TYPE_CHECKING:
    import torch

E4M3_MAX = 448.0
E4M3_MIN_POSITIVE = 2.0**-9
E2M1_MAX = 6.0
BLOCK_SIZE = 16

# Value of each 4-bit code. Code 8 is minus zero; like ModelOpt's table, ours reads it as plain 0.
E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)

# A magnitude between code i and code i + 1 rounds at E2M1_BOUNDARIES[i]. One that lies exactly on
# the boundary takes the even code of the two: down at boundaries 0, 2, 4, 6, up at 1, 3, 5.
E2M1_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# Scales that are accepted. Below FP32's smallest normal number products of scales vanish, and 0 / 0
# would turn zeros into the largest code; above 2**119 a block scale of 448 overflows.
MIN_SCALE = 2.0**-126
MAX_SCALE = 2.0**119


def check_float(x: "torch.Tensor") -> None:
    """Refuse a tensor that cannot be quantized.

    Raises:
        ValueError: If its dtype is not bfloat16, float16 or float32.
    """
    if str(x.dtype) not in ("torch.bfloat16", "torch.float16", "torch.float32"):
        raise ValueError(f"x: bfloat16, float16 or float32 was expected, got {x.dtype}")


def read_scale(scale: "torch.Tensor", name: str) -> float:
    """Return a one-element scale as a float, or refuse it.

    Args:
        scale: One element of any floating dtype.
        name: What the scale is called in the error message.

    Raises:
        ValueError: If there is not exactly one element, or it is not in [2**-126, 2**119].
    """
    if scale.numel() != 1:
        raise ValueError(
            f"{name}: one value per tensor was expected, got shape {list(scale.shape)}"
        )
    value = float(scale)
    if not MIN_SCALE <= value <= MAX_SCALE:
        raise ValueError(f"{name}: a value in [2**-126, 2**119] was expected, got {value}")
    return value


def scale_for(scale: "torch.Tensor", x: "torch.Tensor", name: str) -> "torch.Tensor":
    """Return a scale as an FP32 scalar on x's device.

    A scale in CPU memory is checked as `read_scale` does. One on a GPU is not, because reading it
    would make the caller wait; a scale that is not positive and finite then gives NaN.

    Raises:
        ValueError: As `read_scale`, if the scale is in CPU memory.
    """
    if scale.device.type == "cpu":
        read_scale(scale, name)
    return scale.detach().float().reshape(()).to(x.device)


def check_amax(amax: "torch.Tensor", format_max: float) -> None:
    """Refuse an amax that no scale can be made from.

    As in `scale_for`, a value that lies on a GPU is not read.

    Args:
        amax: The calibrated max |x|.
        format_max: The largest value the format holds at scale 1.

    Raises:
        CalibrationError: If there is not exactly one element, or it is NaN, infinite, zero, or so
            small that ``amax / format_max`` is below 2**-126.
    """
    if amax.numel() != 1:
        raise CalibrationError(
            f"amax: one value per tensor was expected, got shape {list(amax.shape)}; "
            "use a per-tensor quantizer"
        )
    if amax.device.type != "cpu":
        return
    value = float(amax)
    if not (math.isfinite(value) and value / format_max >= MIN_SCALE):
        raise CalibrationError(
            f"amax: a finite value of at least {MIN_SCALE * format_max:.3g} was expected, "
            f"got {value}; calibrate with data that reaches this layer, and check it for NaN"
        )
