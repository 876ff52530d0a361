"""Fast CPU paths of the FP8 and NVFP4 arithmetic, written in C and compiled at first use.

`active` gives the kernels that this machine runs, or None where only the plain torch code can run:
no compiler (a warning says so once), or ``NVVL_KERNELS=plain`` in the environment.
``NVVL_KERNELS=avx2`` and ``portable`` leave out the intrinsics of later processors, or all. All
paths give the same bits, so the choice is one of speed alone; `nvvl.quantize.fp8` and
`nvvl.quantize.nvfp4` make it for each tensor with `pick`.

A tensor is cut into one range for each of torch's threads (``torch.get_num_threads``): the C code
runs on the same ones, where the compiler has OpenMP. Nothing but the outputs is allocated, except
a copy of inputs that are not contiguous.
"""

import ctypes
import functools
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from nvvl.compiler import load_library
from nvvl.errors import HardwareError
from nvvl.quantize.formats import BLOCK_SIZE

Variant = Literal["avx512", "avx2", "portable"]
"""Written with intrinsics, or in plain C; the fastest first."""

_SOURCE = Path(__file__).with_name("kernels.c")
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}

# Waking a thread costs some microseconds: as much as a fast kernel needs for this many elements.
_MIN_ELEMENTS_PER_THREAD = 1 << 15


def active() -> "Kernels | None":
    """Return this machine's fastest kernels as the environment allows, or None for plain torch.

    Raises:
        HardwareError: If ``NVVL_KERNELS`` is none of ``auto``, ``plain`` and the variants, or a
            variant that this processor does not have.
    """
    wanted = os.environ.get("NVVL_KERNELS", "auto")
    if wanted == "plain":
        return None
    if wanted == "auto":
        return _load_fastest_or_warn()
    if wanted not in get_args(Variant):
        known = ", ".join(("auto", *get_args(Variant)))
        raise HardwareError(f"NVVL_KERNELS: {known} or plain was expected, got {wanted!r}")
    return load(cast(Variant, wanted))


@functools.cache
def load(variant: Variant) -> "Kernels":
    """Load one variant of the kernels.

    Raises:
        HardwareError: If they cannot be compiled, or this processor does not have the variant.
    """
    if variant not in list_variants():
        raise HardwareError(f"this processor does not run the {variant} kernels")
    return Kernels(load_library(_SOURCE), variant)


def list_variants() -> list[Variant]:
    """List the variants that this processor runs, the fastest first.

    Raises:
        HardwareError: If the kernels cannot be compiled.
    """
    library = load_library(_SOURCE)
    variants: tuple[Variant, ...] = get_args(Variant)
    return [name for name in variants if hasattr(library, f"nvvl_nvfp4_quantize_bf16_{name}")]


@functools.cache
def _load_fastest_or_warn() -> "Kernels | None":
    try:
        return load(list_variants()[0])
    except HardwareError as error:
        warnings.warn(
            f"quantization runs on plain torch, some fifty times slower: {error}", stacklevel=2
        )
        return None


def pick(x: torch.Tensor, dtype: torch.dtype) -> "Kernels | None":
    """Return the `active` kernels if they take x as input and ``dtype`` on the BF16 or FP32 side.

    They take CPU memory, and no tensor subclass: those include the fake tensors of
    ``torch.export``, which have no memory to point at.
    """
    plain_cpu = x.device.type == "cpu" and type(x) in (torch.Tensor, torch.nn.Parameter)
    return active() if plain_cpu and dtype in _DTYPES else None


@torch.no_grad()
def amax(x: torch.Tensor) -> torch.Tensor:
    """Find the largest magnitude.

    Args:
        x: Any shape but empty; on the CPU in BF16 and FP32 no copy is made.

    Returns:
        FP32 scalar on x's device; NaN if any element is, else infinite if any element is.

    Raises:
        ValueError: If x has no element.
    """
    if x.numel() == 0:
        raise ValueError(f"amax: at least one element was expected, got shape {list(x.shape)}")
    kernels = pick(x, x.dtype)
    if kernels is not None:
        return kernels.amax(x)
    low, high = torch.aminmax(x)  # a NaN anywhere makes both NaN
    return torch.maximum(low.abs(), high.abs()).float()


class Kernels:
    """One variant of the compiled kernels.

    Tensors are contiguous or copied; shapes are checked by the callers, `nvvl.quantize.fp8` and
    `nvvl.quantize.nvfp4`, whose public functions say what each argument is.
    """

    def __init__(self, library: ctypes.CDLL, variant: Variant) -> None:
        """Wrap a loaded library that has the functions of ``variant``."""
        self.variant = variant
        self._library = library

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        """See `amax` of this module; x: bfloat16 or float32 on the CPU, not empty."""
        x = x.contiguous()
        function = self._function(
            "amax", x.dtype, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        )
        function.restype = ctypes.c_uint32
        # As bits, magnitudes sort like floats, with the NaNs above infinity.
        bits = function(x.data_ptr(), x.numel(), _num_threads(x.numel()))
        return torch.tensor(struct.unpack("f", struct.pack("I", bits))[0])

    def nvfp4_quantize(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See `nvvl.quantize.nvfp4.quantize`."""
        *rows, width = x.shape
        packed = self._empty((*rows, width // 2), torch.uint8)
        block_scale = self._empty((*rows, width // BLOCK_SIZE), torch.float8_e4m3fn)
        self._run("nvfp4_quantize", x.dtype, (x.contiguous(), packed, block_scale), scale)
        return packed, block_scale

    def nvfp4_fake_quantize(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """See `nvvl.quantize.nvfp4.fake_quantize`."""
        out = self._empty(x.shape, x.dtype)
        self._run("nvfp4_fake_quantize", x.dtype, (x.contiguous(), out), scale)
        return out

    def nvfp4_dequantize(
        self, packed: torch.Tensor, block_scale: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `nvvl.quantize.nvfp4.dequantize`."""
        out = self._empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype)
        tensors = (packed.contiguous(), block_scale.contiguous(), out)
        self._run("nvfp4_dequantize", dtype, tensors, scale)
        return out

    def fp8_quantize(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """See `nvvl.quantize.fp8.quantize`."""
        out = self._empty(x.shape, torch.float8_e4m3fn)
        self._run("fp8_quantize", x.dtype, (x.contiguous(), out), scale, per_unit=1)
        return out

    def fp8_fake_quantize(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """See `nvvl.quantize.fp8.fake_quantize`."""
        out = self._empty(x.shape, x.dtype)
        self._run("fp8_fake_quantize", x.dtype, (x.contiguous(), out), scale, per_unit=1)
        return out

    def fp8_dequantize(self, codes: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """See `nvvl.quantize.fp8.dequantize`."""
        out = self._empty(codes.shape, dtype)
        self._run("fp8_dequantize", dtype, (codes.contiguous(), out), scale, per_unit=1)
        return out

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        self._library.nvvl_use_huge_pages(
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes)
        )
        return out

    def _function(
        self, name: str, dtype: torch.dtype, argtypes: tuple[type, ...]
    ) -> "ctypes._NamedFuncPointer":
        variant = "" if name == "amax" else f"_{self.variant}"
        function = self._library[f"nvvl_{name}_{_DTYPES[dtype]}{variant}"]
        function.argtypes = argtypes
        return function

    def _run(
        self,
        name: str,
        dtype: torch.dtype,
        tensors: tuple[torch.Tensor, ...],
        scale: float,
        *,
        per_unit: int = BLOCK_SIZE,
    ) -> None:
        """Call a C function on all units; a unit is a block, or one FP8 element."""
        numel = max(t.numel() for t in tensors)
        if numel == 0:
            return
        pointers = (ctypes.c_void_p,) * len(tensors)
        argtypes = (*pointers, ctypes.c_int64, ctypes.c_float, ctypes.c_int64)
        function = self._function(name, dtype, argtypes)
        function.restype = None
        units = numel // per_unit
        function(*(t.data_ptr() for t in tensors), units, scale, _num_threads(numel))


def _num_threads(numel: int) -> int:
    """Return how many of torch's threads are worth waking for so many elements."""
    return min(torch.get_num_threads(), max(1, numel // _MIN_ELEMENTS_PER_THREAD))
