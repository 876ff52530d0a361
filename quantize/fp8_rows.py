"""FP8 (E4M3) with a scale per row: weights "per channel" and inputs "per token" of other tools.

nvvl does not write this format; it computes with it so that a peer's checkpoint can be judged.
Each output channel of a weight has a stored scale; each token of the input gets ``amax / 448`` of
its own on the fly, in FP32, as vLLM's kernels have it (``csrc/quantization/w8a8/fp8``). A token of
zeros stays zeros. (compressed-tensors' own simulation rounds a token's scale to BF16.)
"""

import torch
from torch import Tensor

from nvvl.quantize.formats import E4M3_MAX, check_float

# Rows of a weight treated at once, which bounds the FP32 temporaries.
_ROWS_AT_ONCE = 256


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Turn FP8 codes back into values.

    Args:
        codes: (N, K) float8_e4m3fn.
        scale: (N,) float32, of each row.
        dtype: Of the result.

    Returns:
        (N, K), formed in FP32 and rounded once to ``dtype``.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    groups = zip(*(t.split(_ROWS_AT_ONCE) for t in (codes, scale, out)), strict=True)
    for code_rows, scales, out_rows in groups:
        out_rows.copy_(code_rows.float() * scales[:, None])
    return out


@torch.no_grad()
def fake_quantize(x: Tensor) -> Tensor:
    """Round each token to FP8 and back, with a scale that fits its largest value.

    Args:
        x: (..., K) bfloat16, float16 or float32.

    Returns:
        Of x's shape and dtype.

    Raises:
        ValueError: If x is of another dtype.
    """
    check_float(x)
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A quotient can pass 448 by a rounding; the cast would make it NaN.
    codes = (wide / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
