"""FP8 and NVFP4 written a second time, for the proof alone.

`nvvl.quantize` has fast kernels; this file has the same two formats in the plainest form, shares
no code with them, and says what the bytes of a checkpoint must be. Order of operations is part of
the format, because every step rounds:

    FP8     scale = amax / 448
            code  = e4m3(w / scale), the quotient rounded to w's dtype first
    NVFP4   tensor_scale = amax / (6 * 448)
            block_scale  = e4m3(block_amax / (6 * tensor_scale)), clamped to 2**-9 .. 448,
                           1 for a block of zeros
            code         = e2m1(w / (block_scale * tensor_scale)), ties to the even code

Quotients are float32. An E2M1 code has its sign in bit 3; the even element of a pair lies in the
low nibble. Format: OCP Microscaling specification v1.0; layout: ModelOpt's unified export.
"""

import torch
from torch import Tensor

BLOCK_SIZE = 16
E4M3_MAX = 448.0
NVFP4_MAX = 6.0 * E4M3_MAX

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_VALUES = torch.cat([_E2M1, -_E2M1])

# Midpoints between neighbouring magnitudes. At a midpoint the even code wins: the lower one at
# 0.25, 1.25, 2.5 and 5, the upper one at 0.75, 1.75 and 3.5.
_MIDPOINTS_DOWN = (0.25, 1.25, 2.5, 5.0)
_MIDPOINTS_UP = (0.75, 1.75, 3.5)


def scale_of(amax: float, format_max: float) -> float:
    """Return amax / format_max, rounded once to float32.

    Args:
        amax: the calibrated largest magnitude.
        format_max: 448 for FP8, 2688 for NVFP4.
    """
    return float(torch.tensor(amax, dtype=torch.float32) / format_max)


def encode_fp8(weight: Tensor, scale: float) -> Tensor:
    """Return the codes an FP8 weight must have.

    Args:
        weight: (N, K) bfloat16 or float32.
        scale: amax / 448.

    Returns:
        (N, K) float8_e4m3fn.
    """
    quotient = (weight.float() / torch.tensor(scale)).to(weight.dtype).float()
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_fp8(codes: Tensor, scale: float) -> Tensor:
    """Return the float32 values of (N, K) float8_e4m3fn codes."""
    return codes.float() * scale


def encode_nvfp4(weight: Tensor, tensor_scale: float) -> tuple[Tensor, Tensor]:
    """Return the bytes and block scales an NVFP4 weight must have.

    Args:
        weight: (N, K) bfloat16 or float32, K a multiple of 16.
        tensor_scale: amax / 2688.

    Returns:
        Packed codes (N, K/2) uint8 and block scales (N, K/16) float8_e4m3fn.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK_SIZE))  # (N, K/16, 16)
    factor = torch.tensor(tensor_scale)
    scale = blocks.abs().amax(-1) / (6.0 * factor)
    scale = torch.where(scale == 0, 1.0, scale).clamp(2.0**-9, E4M3_MAX)
    block_scale = scale.to(torch.float8_e4m3fn)
    quotient = (blocks / (block_scale.float() * factor).unsqueeze(-1)).flatten(-2)
    codes = _encode_e2m1(quotient)
    return codes[:, 0::2] | codes[:, 1::2] << 4, block_scale


def decode_nvfp4(packed: Tensor, block_scale: Tensor, tensor_scale: float) -> Tensor:
    """Return the float32 values of an NVFP4 weight.

    Args:
        packed: (N, K/2) uint8.
        block_scale: (N, K/16) float8_e4m3fn.
        tensor_scale: weight_scale_2.

    Returns:
        (N, K) float32.
    """
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)  # (N, K)
    values = _E2M1_VALUES[codes.int()].unflatten(-1, (-1, BLOCK_SIZE))
    return (values * (block_scale.float() * tensor_scale).unsqueeze(-1)).flatten(-2)


def _encode_e2m1(x: Tensor) -> Tensor:
    magnitude = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in _MIDPOINTS_DOWN:
        codes += magnitude > midpoint
    for midpoint in _MIDPOINTS_UP:
        codes += magnitude >= midpoint
    return codes | (x < 0).to(torch.uint8) << 3
