"""FP8 (E4M3) with one scale per tensor: quantize, dequantize, fake-quantize.

``codes = e4m3(clamp(x / scale, -448, 448))`` and ``x ~ codes * scale`` with ``scale = amax / 448``.
The quotient is computed in FP32 and rounded to x's dtype before E4M3. For BF16 that is two
roundings, and they are kept on purpose: torch divides a BF16 tensor by an FP32 scalar that way, so
ModelOpt's packed weights have them, and ours are the same bytes. Products are formed in FP32 and
rounded once, as a server that multiplies the FP32 scale into its accumulator sees them. (ModelOpt's
``FP8QTensor.dequantize`` to BF16 rounds the scale to BF16 first, which is off by up to 2**-9.)

`fake_quantize` is `dequantize` of `quantize`, for weights and activations alike, so a simulated
model computes with exactly the numbers that are written to disk. ModelOpt's own eager fake-quant
multiplies by 448 / amax instead of dividing and skips the rounding to BF16, so it takes the
neighbouring code for about 4 % of BF16 values.

Saturates: magnitudes above 448 scales, infinities too, become +-448. A NaN of either sign gets
code 0x7F.

On the CPU the compiled kernels of `nvvl.quantize.kernels` do the work; elsewhere, and for FP16,
plain torch does. Formats and sources: `nvvl.quantize.formats`.
"""

import torch

from nvvl.quantize import kernels
from nvvl.quantize.formats import E4M3_MAX, check_amax, check_float, read_scale, scale_for


def scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """Return the scale that maps amax to E4M3's largest value.

    Args:
        amax: Scalar, the calibrated max |x|.

    Returns:
        FP32 scalar, amax / 448.

    Raises:
        CalibrationError: If amax, in CPU memory, is NaN, infinite, zero or too small for a scale.
    """
    check_amax(amax, E4M3_MAX)
    # Divided tensor by tensor: CUDA multiplies by a reciprocal when the divisor is a number.
    amax = amax.detach().float().reshape(())
    return amax / torch.full_like(amax, E4M3_MAX)


@torch.no_grad()
def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8 codes.

    Args:
        x: bfloat16, float16 or float32, any shape.
        scale: FP32 scalar, x ~ codes * scale.

    Returns:
        float8_e4m3fn codes of x's shape.

    Raises:
        ValueError: If x is of another dtype, or the scale is not one value in [2**-126, 2**119].
    """
    check_float(x)
    fast = kernels.pick(x, x.dtype)
    if fast is not None:
        return fast.fp8_quantize(x, read_scale(scale, "scale"))
    quotient = x.to(torch.float32, copy=True).div_(scale_for(scale, x, "scale")).to(x.dtype)
    codes = quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    # Casts disagree on the sign of a NaN, even between torch's vectorized and scalar loops.
    codes.view(torch.uint8).masked_fill_(quotient.isnan(), 0x7F)
    return codes


@torch.no_grad()
def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Turn FP8 codes back into values.

    Args:
        codes: float8_e4m3fn, any shape.
        scale: FP32 scalar.
        dtype: Of the result: bfloat16, float16 or float32.

    Returns:
        codes * scale, formed in FP32 and rounded once to ``dtype``.

    Raises:
        ValueError: If codes are of another dtype, or the scale is not one value in
            [2**-126, 2**119].
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes: float8_e4m3fn was expected, got {codes.dtype}")
    fast = kernels.pick(codes, dtype)
    if fast is not None:
        return fast.fp8_dequantize(codes, read_scale(scale, "scale"), dtype)
    return (codes.float() * scale_for(scale, codes, "scale")).to(dtype)


@torch.no_grad()
def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``dequantize(quantize(x, scale), scale, x.dtype)``, bit for bit, in one pass.

    Args:
        x: bfloat16, float16 or float32, any shape.
        scale: FP32 scalar.

    Returns:
        Of x's shape and dtype, without gradient.

    Raises:
        ValueError: As `quantize`.
    """
    check_float(x)
    fast = kernels.pick(x, x.dtype)
    if fast is not None:
        return fast.fp8_fake_quantize(x, read_scale(scale, "scale"))
    return dequantize(quantize(x, scale), scale, x.dtype)
