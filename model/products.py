"""Matrix products of bfloat16 tensors, at the speed of the machine.

Many CPUs multiply bfloat16 slower than float32: 3.6 times on AVX2, and twice where an Intel
processor has instructions for it but no matrix units (`nvvl.cpu`). There the operands of a large
product are widened, multiplied in float32 and the result is rounded once: what units with float32
accumulators do, up to the order of the sums. Elsewhere, and for products of few rows, which read
each weight once and gain nothing, torch's own is called.
"""

import platform
import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvvl.cpu import bf16_speedup

MIN_ROWS = 8
"""Rows from which widening the weight costs less than it gains."""

_CHUNK_ELEMENTS = 16 * 2**20
"""Elements of a weight that are widened at once: 64 MB of float32. With 16 MB a 12B's ``down_proj``
has a sixth less speed, because BLAS arranges ``x`` anew for every piece.
"""

# Memory for them. Fresh pages each time would cost up to a fifth of the product.
_kept = threading.local()


@cache
def has_fast_bf16() -> bool:
    """Tell whether torch multiplies bfloat16 on this CPU faster than float32.

    Processors other than x86 are taken to; nothing was measured on them.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return True
    kept_to = torch.backends.cpu.get_cpu_capability()
    return kept_to not in {"DEFAULT", "NO AVX", "AVX2"} and bf16_speedup() > 1


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of ``x`` are fastest without losing accuracy."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_fast_bf16()
    return torch.float32 if slow else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + b``.

    Args:
        x: (..., K).
        weight: (N, K), same dtype as ``x``.
        bias: (N,) or None.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    wide = product_dtype(x)
    if wide == x.dtype or x.numel() < MIN_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    x_wide = x.to(wide)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    biases = [None] * -(-weight.shape[0] // rows) if bias is None else bias.to(wide).split(rows)
    parts = zip(weight.split(rows), biases, strict=True)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.cat([F.linear(x_wide, w.to(wide), b).to(x.dtype) for w, b in parts], dim=-1)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for (part, part_bias), target in zip(parts, out.split(rows, dim=-1), strict=True):
        target.copy_(F.linear(x_wide, _widen(part), part_bias))
    return out


def _widen(weight: Tensor) -> Tensor:
    """Return a weight in float32, in memory that the thread's next call overwrites."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < weight.numel():
        with torch.inference_mode(False):
            room = torch.empty(max(weight.numel(), _CHUNK_ELEMENTS))
        _kept.room = room
    return room[: weight.numel()].view(weight.shape).copy_(weight)


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Transform ``input`` (..., K) to (..., N)."""
        return linear(input, self.weight, self.bias)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute softmax attention, as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, T, D).
        key: (B, V, S, D).
        value: (B, V, S, D).
        mask: bool, broadcastable to (B, H, T, S), True where a query may look.
        is_causal: look at no later token; T = S then.
        enable_gqa: V < H, and each key-value head serves H / V query heads.

    Returns:
        (B, H, T, D) in the dtype of ``query``.
    """
    wide = product_dtype(query)
    return F.scaled_dot_product_attention(
        query.to(wide),
        key.to(wide),
        value.to(wide),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
    ).to(query.dtype)
