"""NVFP4: E2M1 codes in blocks of 16, an E4M3 scale per block, one FP32 scale per tensor.

The method, in FP32 throughout and bit for bit ModelOpt's ``NVFP4QTensor``:

* ``tensor_scale = amax / (6 * 448)``.
* ``block_scale = e4m3(clamp(block_amax / (6 * tensor_scale), 2**-9, 448))``, and 1 where the
  quotient is exactly zero: blocks of zeros, and blocks so far below the amax that it underflows.
* ``code = e2m1(x / (block_scale * tensor_scale))``: to nearest, ties to the even code, saturated
  at 6. The sign comes from the quotient, so one that underflows to -0 gets code 0, not 8.
* Back: ``e2m1_value * (block_scale * tensor_scale)``, rounded once to the wanted dtype. Code 8,
  minus zero, gives +0.

Weights and activations use the same functions. For activations the tensor scale is static, from
calibration, and block scales are computed on the fly. A block larger than the calibrated amax
saturates at ``6 * 448 * tensor_scale``; so do infinities. A NaN makes its whole block NaN, in the
block scale and after `dequantize`.

`fake_quantize` equals `dequantize` of `quantize`, bit for bit. ModelOpt has no CPU code for it. Its
CUDA kernel rounds the same way, but lets small block scales underflow to 0 and puts 1 in place of
every ``block_scale * tensor_scale`` under 1e-5, so that blocks of values under 6e-5 vanish in the
simulation while the packed weights keep them; ours simulates what is packed.

On the CPU the compiled kernels of `nvvl.quantize.kernels` do the work; elsewhere, and for FP16,
plain torch does. Layout on disk and sources: `nvvl.quantize.formats`.
"""

from collections.abc import Iterator

import torch

from nvvl.quantize import kernels
from nvvl.quantize.formats import (
    BLOCK_SIZE,
    E2M1_BOUNDARIES,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_POSITIVE,
    check_amax,
    check_float,
    read_scale,
    scale_for,
)

# Elements that plain torch treats at once on a CPU, which bounds its FP32 temporaries.
_CHUNK_ELEMENTS = 1 << 20


def tensor_scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """Return the tensor scale that lets the block with the amax use E4M3's largest value.

    Args:
        amax: Scalar, the calibrated max |x|.

    Returns:
        FP32 scalar, amax / (6 * 448).

    Raises:
        CalibrationError: If amax, in CPU memory, is NaN, infinite, zero or too small for a scale.
    """
    check_amax(amax, E2M1_MAX * E4M3_MAX)
    # Divided tensor by tensor: CUDA multiplies by a reciprocal when the divisor is a number.
    amax = amax.detach().float().reshape(())
    return amax / torch.full_like(amax, E2M1_MAX * E4M3_MAX)


@torch.no_grad()
def quantize(x: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to packed NVFP4 codes and block scales.

    Args:
        x: (..., K) bfloat16, float16 or float32, K a multiple of 16.
        tensor_scale: FP32 scalar.

    Returns:
        packed: (..., K / 2) uint8, the code of even index in the low nibble.
        block_scale: (..., K / 16) float8_e4m3fn.

    Raises:
        ValueError: If K is not a multiple of 16, x is of another dtype, or the tensor scale is not
            one value in [2**-126, 2**119].
    """
    _check_input(x)
    fast = kernels.pick(x, x.dtype)
    if fast is not None:
        return fast.nvfp4_quantize(x, read_scale(tensor_scale, "tensor_scale"))
    scale = scale_for(tensor_scale, x, "tensor_scale")
    *rows, width = x.shape
    packed = torch.empty((*rows, width // 2), dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(
        (*rows, width // BLOCK_SIZE), dtype=torch.float8_e4m3fn, device=x.device
    )
    for x_rows, packed_rows, scale_rows in _row_groups(width, x, packed, block_scale):
        blocks = x_rows.float().unflatten(-1, (-1, BLOCK_SIZE))
        scale_rows.copy_(_block_scales(blocks, scale))
        step = scale_rows.float() * scale
        packed_rows.copy_(pack(_encode(blocks / step.unsqueeze(-1)).flatten(-2)))
    return packed, block_scale


@torch.no_grad()
def dequantize(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    tensor_scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Turn packed codes back into values.

    Args:
        packed: (..., K / 2) uint8.
        block_scale: (..., K / 16) float8_e4m3fn.
        tensor_scale: FP32 scalar.
        dtype: Of the result: bfloat16, float16 or float32.

    Returns:
        (..., K) of ``dtype``.

    Raises:
        ValueError: If dtypes or shapes do not fit together, or the tensor scale is not one value in
            [2**-126, 2**119].
    """
    _check_packed(packed, block_scale)
    fast = kernels.pick(packed, dtype)
    if fast is not None:
        value = read_scale(tensor_scale, "tensor_scale")
        return fast.nvfp4_dequantize(packed, block_scale, value, dtype)
    scale = scale_for(tensor_scale, packed, "tensor_scale")
    table = torch.tensor(E2M1_VALUES, device=packed.device)
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device)
    for packed_rows, scale_rows, out_rows in _row_groups(out.shape[-1], packed, block_scale, out):
        values = table[unpack(packed_rows).int()].unflatten(-1, (-1, BLOCK_SIZE))
        step = scale_rows.float() * scale
        out_rows.copy_((values * step.unsqueeze(-1)).flatten(-2))
    return out


@torch.no_grad()
def fake_quantize(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Return ``dequantize(*quantize(x, tensor_scale), tensor_scale, x.dtype)`` in one pass.

    Args:
        x: (..., K) bfloat16, float16 or float32, K a multiple of 16.
        tensor_scale: FP32 scalar.

    Returns:
        Of x's shape and dtype, without gradient; the same bits as the two steps.

    Raises:
        ValueError: As `quantize`.
    """
    _check_input(x)
    fast = kernels.pick(x, x.dtype)
    if fast is not None:
        return fast.nvfp4_fake_quantize(x, read_scale(tensor_scale, "tensor_scale"))
    return dequantize(*quantize(x, tensor_scale), tensor_scale, x.dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put two codes in a byte: (..., K) uint8 of values 0 to 15 -> (..., K / 2) uint8."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Take the codes out again: (..., K / 2) uint8 -> (..., K) uint8 of values 0 to 15."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def _block_scales(blocks: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """(rows, K / 16, 16) float32 -> (rows, K / 16) float8_e4m3fn."""
    scale = blocks.abs().amax(dim=-1) / (E2M1_MAX * tensor_scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # Clamped before the cast, which would turn large values into NaN and small ones into 0.
    return scale.clamp(E4M3_MIN_POSITIVE, E4M3_MAX).to(torch.float8_e4m3fn)


def _encode(y: torch.Tensor) -> torch.Tensor:
    """Round float32 quotients to E2M1 codes, uint8; a NaN gets code 7."""
    # bucketize counts the boundaries strictly below |y|. Where a tie goes up, to the even code, the
    # boundary is moved down by one unit in the last place.
    boundaries = torch.tensor(E2M1_BOUNDARIES, device=y.device)
    boundaries[1::2] = boundaries[1::2].nextafter(boundaries.new_zeros(()))
    magnitude = torch.bucketize(y.abs().contiguous(), boundaries, out_int32=True).to(torch.uint8)
    return magnitude | ((y < 0).to(torch.uint8) << 3)


def _row_groups(width: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Walk tensors with equal leading dimensions together, as (rows, last dimension) views."""
    on_cpu = tensors[0].device.type == "cpu"
    rows = max(1, _CHUNK_ELEMENTS // width) if on_cpu else max(1, tensors[0].numel())
    return zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in tensors), strict=True)


def _check_input(x: torch.Tensor) -> None:
    check_float(x)
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"x: NVFP4 needs a last dimension that is a multiple of {BLOCK_SIZE}, "
            f"got shape {list(x.shape)}"
        )


def _check_packed(packed: torch.Tensor, block_scale: torch.Tensor) -> None:
    dtypes = (packed.dtype, block_scale.dtype)
    if dtypes != (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(
            f"packed, block_scale: uint8 and float8_e4m3fn were expected, got {dtypes}"
        )
    shape = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK_SIZE) if packed.dim() else ()
    if packed.numel() != block_scale.numel() * BLOCK_SIZE // 2 or shape != block_scale.shape:
        raise ValueError(
            f"block_scale: one scale for every {BLOCK_SIZE} codes was expected, got shape "
            f"{list(block_scale.shape)} for packed {list(packed.shape)}"
        )
