"""The Mamba2 scan in C, for CPUs with vector units; compiled at first use.

`pick_scan` gives it where it can run: bfloat16 on the CPU, no gradients wanted, a compiler, and a
processor with AVX2. Elsewhere `nvvl.model.mamba2` computes in torch, or on a GPU by
`nvvl.model.mamba_kernels`, to the same values up to the order of sums and the rounding of what lies
between products. The result depends on nothing but the arguments: not on the number of threads, the
other sequences of a batch, or where in a packed row a sequence stands.
"""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from nvvl.compiler import load_library
from nvvl.errors import HardwareError
from nvvl.model.products import has_fast_bf16

Variant = Literal["bf16", "avx512", "avx2"]
"""Products of bfloat16 with AVX-512, or of float32."""

_SOURCE = Path(__file__).with_name("scan.c")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64

CHUNK = 64
"""Tokens of a chunk, fixed in the C code."""

LANES = 16
"""Head dim and state size have to be multiples of this."""


def pick_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> "CompiledScan | None":
    """Return the compiled scan if it can take these arguments of `nvvl.model.mamba2.ssm_scan`."""
    inputs = (x, dt, b, c, state)
    fits = (
        x.dtype == b.dtype == c.dtype == torch.bfloat16
        and all(type(part) is Tensor and part.device.type == "cpu" for part in inputs)
        and x.shape[3] % LANES == b.shape[3] % LANES == 0
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in (*inputs, a, d)))
        and not torch.compiler.is_compiling()
    )
    return allowed_scan() if fits else None


def allowed_scan() -> "CompiledScan | None":
    """Return the compiled scan that is fastest here, or None where torch's own is to run.

    ``NVVL_KERNELS=avx2`` leaves out later processors' units, ``portable`` and ``plain`` all of it.
    """
    wanted = os.environ.get("NVVL_KERNELS", "auto")
    if wanted in {"portable", "plain"}:
        return None
    scans = load_scans()
    names: list[Variant] = ["avx2"] if wanted == "avx2" else ["avx512", "avx2"]
    if wanted != "avx2" and has_fast_bf16():
        names.insert(0, "bf16")
    return next((scans[name] for name in names if name in scans), None)


@functools.cache
def load_scans() -> "dict[Variant, CompiledScan]":
    """Load the variants of the compiled scan that this processor runs.

    Where they cannot be compiled there are none, and a warning says so once.
    """
    try:
        library = load_library(_SOURCE)
    except HardwareError as error:
        warnings.warn(f"the Mamba2 scan runs on plain torch: {error}", stacklevel=2)
        return {}
    variants: tuple[Variant, ...] = get_args(Variant)
    return {
        name: CompiledScan(library, name)
        for name in variants
        if hasattr(library, f"nvvl_scan_{name}")
    }


class CompiledScan:
    """One variant of the C code, on torch's threads."""

    def __init__(self, library: ctypes.CDLL, variant: Variant) -> None:
        """Wrap a loaded library that has the functions of ``variant``."""
        self.variant = variant
        self._scan = getattr(library, f"nvvl_scan_{variant}")
        self._scan.argtypes, self._scan.restype = ((_POINTER,) * 11 + (_INT,) * 8), None
        self._scratch_size = getattr(library, f"nvvl_scan_scratch_{variant}")
        self._scratch_size.argtypes, self._scratch_size.restype = (_INT,) * 4, _INT

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        state: Tensor,
        *,
        keep: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Scan; arguments and results as `nvvl.model.mamba2.ssm_scan`, in chunks of `CHUNK`."""
        batch, length, num_heads, head_dim = x.shape
        groups, width = b.shape[2:]
        rows = x, b, c = [_with_whole_tokens(part) for part in (x, b, c)]
        strides = [part.stride(dim) for dim in (1, 0) for part in rows]
        dt, a, d = dt.contiguous(), a.contiguous(), d.contiguous()
        state = state.clone(memory_format=torch.contiguous_format)
        y = torch.empty(x.shape, dtype=torch.float32)
        threads = torch.get_num_threads()
        heads = _heads_at_once(batch * groups, num_heads // groups, threads)
        scratch = torch.empty(self._scratch_size(heads, head_dim, width, threads))
        self._scan(
            *(part.data_ptr() for part in rows),
            (_INT * 6)(*strides),
            *(part.data_ptr() for part in (dt, a, d)),
            None if keep is None else keep.data_ptr(),
            *(part.data_ptr() for part in (state, y, scratch)),
            *(batch, length, num_heads, head_dim, groups, width, heads, threads),
        )
        return y, state


def _with_whole_tokens(part: Tensor) -> Tensor:
    """Return (B, T, ...) with what belongs to a token in one piece."""
    whole = part.stride(3) == 1 and part.stride(2) == part.shape[3]
    return part if whole else part.contiguous()


def _heads_at_once(groups: int, heads: int, threads: int) -> int:
    """Return how many of a group's heads one thread takes: all, unless threads were left idle."""
    parts = min(-(-threads // groups), heads)
    while heads % parts:
        parts += 1
    return heads // parts
