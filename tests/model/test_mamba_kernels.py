"""The scan of mamba-ssm, which needs a GPU: how it is called, and when it is not.

The package is stood in for by its recurrence, token by token, with the signature it has.
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nvvl.model import mamba_kernels
from nvvl.model.mamba2 import scan_chunks
from nvvl.model.mamba_kernels import MambaKernels, _proved, allowed_kernels, pick_kernels

CHUNK = 8
SIZES = (4, 16, 2, 8)
CPU = torch.device("cpu")


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: None = None,
    dt_bias: None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    assert return_final_states
    assert not dt_softplus
    assert D is not None
    assert chunk_size == CHUNK
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2])
    repeats = x.shape[2] // B.shape[2]
    b, c = (part.float().repeat_interleave(repeats, 2) for part in (B, C))
    state = torch.zeros(x.shape[0], *x.shape[2:], B.shape[3])
    state = state if initial_states is None else initial_states
    rows = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t and bool((seq_idx[:, t] != seq_idx[:, t - 1]).any()):
            state = torch.zeros_like(state)
        step = dt[:, t, :, None, None]
        update = x[:, t].float()[..., None] * b[:, t, :, None, :]
        state = state * torch.exp(step * A[:, None, None]) + step * update
        rows.append((state * c[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t].float())
    return torch.stack(rows, 1).to(x.dtype), state


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Give a function that installs a package whose scan is what it is given."""

    def put(scan: Any) -> None:
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
            package = types.ModuleType(name)
            package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
            monkeypatch.setitem(sys.modules, name, package)
        module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
        if scan is not None:
            module.mamba_chunk_scan_combined = scan  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        mamba_kernels._load.cache_clear()

    monkeypatch.delenv("NVVL_KERNELS", raising=False)
    yield put
    mamba_kernels._load.cache_clear()


@pytest.mark.parametrize("keep", [None, [1.0, 0.0, 1.0, 0.0]], ids=["whole", "packed"])
def test_kernels_are_called_as_our_scan_is(keep: list[float] | None) -> None:
    heads, head_dim, groups, width = SIZES
    length = 4 * CHUNK
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, heads, head_dim, generator=draw).bfloat16()
    b, c = torch.randn(2, 2, length, groups, width, generator=draw).bfloat16()
    dt = torch.rand(2, length, heads, generator=draw)
    a, d = -torch.rand(heads, generator=draw), torch.randn(heads, generator=draw)
    state = torch.randn(2, heads, head_dim, width, generator=draw) * (keep is None)
    kept = None if keep is None else torch.tensor(keep)
    arguments = (x, dt, a, b, c, d, state)
    found = MambaKernels(mamba_chunk_scan_combined)(*arguments, chunk_size=CHUNK, keep=kept)
    wanted = scan_chunks(*arguments, chunk_size=CHUNK, keep=kept)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        # ours rounds scores and states to BF16 between products, this rounds y alone
        assert float((one - other).norm() / other.norm()) < 0.01


def test_kernels_that_agree_are_taken() -> None:
    assert _proved(mamba_chunk_scan_combined, SIZES, CHUNK, CPU) is not None


def forgets_the_state(*arguments: Any, **options: Any) -> Any:
    return mamba_chunk_scan_combined(*arguments, **options | {"initial_states": None})


def joins_sequences(*arguments: Any, **options: Any) -> Any:
    return mamba_chunk_scan_combined(*arguments, **options | {"seq_idx": None})


def gives_nan(*arguments: Any, **options: Any) -> Any:
    y, state = mamba_chunk_scan_combined(*arguments, **options)
    return y * float("nan"), state


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel image is available\nfor this GPU")


@pytest.mark.parametrize(
    ("scan", "reason"),
    [
        (forgets_the_state, "differs from torch by"),
        (joins_sequences, "differs from torch by"),
        (gives_nan, "differs from torch by nan%"),
        (fails, "no kernel image is available$"),
    ],
)
def test_kernels_that_disagree_are_left_alone(scan: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"on plain torch, not mamba-ssm: {reason}"):
        assert _proved(scan, SIZES, CHUNK, CPU) is None


def test_package_is_found_unless_the_environment_forbids(
    install: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        mamba_kernels._load.cache_clear()
        assert allowed_kernels() is None
    install(mamba_chunk_scan_combined)
    assert allowed_kernels() is mamba_chunk_scan_combined
    monkeypatch.setenv("NVVL_KERNELS", "plain")
    assert allowed_kernels() is None


def test_broken_package_is_named(install: Callable[[Any], None]) -> None:
    install(None)
    with pytest.warns(UserWarning, match="cannot import name 'mamba_chunk_scan_combined'"):
        assert allowed_kernels() is None


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_scan_of_a_gpu_takes_the_kernels_unless_gradients_are_wanted(
    install: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(mamba_chunk_scan_combined)
    heads, head_dim, groups, width = SIZES
    x = torch.randn(1, 2 * CHUNK, heads, head_dim).bfloat16()
    b, c = torch.randn(2, 1, 2 * CHUNK, groups, width).bfloat16()
    dt, state = torch.rand(1, 2 * CHUNK, heads), torch.zeros(1, heads, head_dim, width)
    a, d = -torch.rand(heads), torch.rand(heads)
    assert pick_kernels(x, dt, a, b, c, d, state, chunk_size=CHUNK) is None  # on a CPU
    monkeypatch.setattr(mamba_kernels, "Tensor", OnGpu)
    x, dt, b, c, state = (part.as_subclass(OnGpu) for part in (x, dt, b, c, state))
    assert pick_kernels(x, dt, a, b, c, d, state, chunk_size=CHUNK) is not None
    x.requires_grad_()
    assert pick_kernels(x, dt, a, b, c, d, state, chunk_size=CHUNK) is None
    with torch.no_grad():
        assert pick_kernels(x, dt, a, b, c, d, state, chunk_size=CHUNK) is not None
