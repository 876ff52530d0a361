"""The Mamba2 scan of the package ``mamba-ssm``, for GPUs where it is installed (extra ``mamba``).

Before its Triton kernels are used, they are compared with `nvvl.model.mamba2.scan_chunks` on random
numbers, in the sizes they are asked for. Where they cannot run, or give something else, a warning
says so and torch computes; so it does with ``NVVL_KERNELS=plain``, and where gradients are wanted:
theirs are sums in no fixed order, and a training that goes on has to give the same bits.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvvl.errors import first_line

# Values, scores and states between chunks are BF16 in both, rounded by 2**-9 each; this is some ten
# such roundings, and a wrong state or decay is off by far more.
_TOLERANCE = 0.02

_CHECKED_CHUNKS = 3


def pick_kernels(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    *,
    chunk_size: int,
) -> "MambaKernels | None":
    """Return the kernels if they can take these arguments of `nvvl.model.mamba2.ssm_scan`."""
    inputs = (x, dt, b, c, state)
    fits = (
        x.is_cuda
        and x.dtype == b.dtype == c.dtype == torch.bfloat16
        and all(type(part) is Tensor for part in inputs)
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in (*inputs, a, d)))
        and not torch.compiler.is_compiling()
    )
    scan = allowed_kernels() if fits else None
    if scan is None:
        return None
    sizes = (*x.shape[2:], *b.shape[2:])
    return _proved(scan, sizes, chunk_size, x.device)


def allowed_kernels() -> "Callable[..., Any] | None":
    """Return the package's scan, or None where it is not installed or the environment forbids."""
    return None if os.environ.get("NVVL_KERNELS") == "plain" else _load()


class MambaKernels:
    """The scan of ``mamba-ssm``, called as ours is."""

    def __init__(self, scan: Callable[..., Any]) -> None:
        """Wrap ``mamba_chunk_scan_combined``."""
        self._scan = scan

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
        chunk_size: int,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scan; arguments and results as `nvvl.model.mamba2.ssm_scan`, y rounded to BF16."""
        sequences = None
        if keep is not None:  # the state is zero where a sequence begins
            numbers = (keep == 0).cumsum(0).to(torch.int32).repeat_interleave(chunk_size)
            sequences = numbers.expand(x.shape[0], -1).contiguous()
        y, state = self._scan(
            x,
            dt,
            a,
            b,
            c,
            chunk_size,
            D=d,
            initial_states=state if keep is None else None,
            seq_idx=sequences,
            return_final_states=True,
        )
        return y.float(), state.float()


@functools.cache
def _load() -> "Callable[..., Any] | None":
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_chunk_scan_combined,
        )
    except Exception as error:  # whatever a build for another torch or GPU raises
        _warn(first_line(error))
        return None
    scan: Callable[..., Any] = mamba_chunk_scan_combined
    return scan


@functools.cache
@torch.no_grad()
def _proved(
    scan: Callable[..., Any], sizes: tuple[int, ...], chunk_size: int, device: torch.device
) -> MambaKernels | None:
    """Return the kernels if they agree with torch on (heads, head dim, groups, state size)."""
    kernels = MambaKernels(scan)
    try:
        errors = _compare(kernels, sizes, chunk_size, device)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # whatever Triton and the driver raise
        _warn(first_line(error))
        return None
    if not max(errors) <= _TOLERANCE:  # NaN is refused too
        found = ", ".join(f"{error:.1%}" for error in errors)
        _warn(f"differs from torch by {found}")
        return None
    return kernels


def _compare(
    kernels: MambaKernels, sizes: tuple[int, ...], chunk_size: int, device: torch.device
) -> list[float]:
    """Return the relative errors of outputs and states, from a state and of packed sequences."""
    from nvvl.model.mamba2 import scan_chunks

    heads, head_dim, groups, width = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    length = _CHECKED_CHUNKS * chunk_size
    x, b, c = (
        draw(1, length, *shape).bfloat16()
        for shape in ((heads, head_dim), (groups, width), (groups, width))
    )
    dt = torch.nn.functional.softplus(draw(1, length, heads) - 2)
    a, d, state = -draw(heads).abs(), draw(heads), draw(1, heads, head_dim, width)
    keep = torch.tensor([1.0, 0.0, 1.0], device=device)
    errors = []
    for start, kept in ((state, None), (torch.zeros_like(state), keep)):
        arguments = (x, dt, a, b, c, d, start)
        found = kernels(*arguments, chunk_size=chunk_size, keep=kept)
        wanted = scan_chunks(*arguments, chunk_size=chunk_size, keep=kept)
        errors += [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]
    return errors


def _warn(reason: str) -> None:
    warnings.warn(f"the Mamba2 scan runs on plain torch, not mamba-ssm: {reason}", stacklevel=2)
