"""The compiled Mamba2 scan against the recurrence in float64, and when it is used."""

import os
import shlex
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from nvvl.compiler import load_library
from nvvl.model import products
from nvvl.model import scan as scan_module
from nvvl.model.mamba2 import scan_chunks, ssm_scan
from nvvl.model.scan import (
    CHUNK,
    CompiledScan,
    Variant,
    _heads_at_once,
    allowed_scan,
    load_scans,
    pick_scan,
)

BF16_UNITS = Path(__file__).with_name("bf16_units.h")

# Relative, in the norm. In float32 sums of up to 176 terms are rounded by 2^-24 each, and decays by
# a few of these. With "bf16" scores, values and states enter products rounded by 2^-9, and what
# enters products with the state by 2^-17 = 7.6e-6.
Y_TOLERANCES: dict[Variant, float] = {"bf16": 2.0**-9, "avx512": 2e-6, "avx2": 2e-6}
STATE_TOLERANCES: dict[Variant, float] = {"bf16": 1e-5, "avx512": 2e-6, "avx2": 2e-6}

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, CompiledScan]:
    """Give all variants, "bf16" with stand-ins for instructions that the processor lacks."""
    found = dict(load_scans())
    command = shlex.split(os.environ.get("CC", "cc"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", shlex.join([*command, "-include", str(BF16_UNITS)]))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        library = load_library(scan_module._SOURCE)  # it compiles, or this fails
    if hasattr(library, "nvvl_scan_bf16"):
        found.setdefault("bf16", CompiledScan(library, "bf16"))
    return found


@pytest.fixture(params=get_args(Variant))
def scan(
    request: pytest.FixtureRequest, compiler: str, scans: dict[Variant, CompiledScan]
) -> CompiledScan:
    if request.param not in scans:
        pytest.skip(f"this processor has no AVX-512 or AVX2, which {request.param} needs")
    return scans[request.param]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_arguments(
    length: int,
    *,
    batch: int = 1,
    heads: int = 4,
    head_dim: int = 32,
    groups: int = 2,
    state_size: int = 32,
) -> Arguments:
    """Draw x, dt, a, b, c, d and state; x, b and c are parts of one tensor, as in the mixer."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    widths = [heads * head_dim, groups * state_size, groups * state_size]
    x, b, c = draw(batch, length, sum(widths)).bfloat16().split(widths, dim=-1)
    return (
        x.unflatten(-1, (heads, -1)),
        torch.nn.functional.softplus(draw(batch, length, heads) - 2),
        -torch.exp(1.5 * draw(heads)),
        b.unflatten(-1, (groups, -1)),
        c.unflatten(-1, (groups, -1)),
        draw(heads),
        draw(batch, heads, head_dim, state_size),
    )


def recurrence(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Advance all heads token by token in float64."""
    x, dt, a, b, c, d, state = (part.double() for part in arguments)
    b, c = (part.repeat_interleave(x.shape[2] // part.shape[2], dim=2) for part in (b, c))
    outputs = []
    for t in range(x.shape[1]):
        update = (x[:, t] * dt[:, t, :, None])[..., None] * b[:, t, :, None]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + update
        outputs.append((state * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def assert_same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "state_size"),
    [(4, 64, 2, 64), (3, 80, 1, 128), (2, 16, 2, 16), (4, 96, 4, 48), (1, 176, 1, 32)],
)
def test_it_equals_the_recurrence(
    scan: CompiledScan, length: int, heads: int, head_dim: int, groups: int, state_size: int
) -> None:
    arguments = make_arguments(
        length, batch=2, heads=heads, head_dim=head_dim, groups=groups, state_size=state_size
    )
    before = arguments[6].clone()
    y, state = scan(*arguments, keep=None)
    expected_y, expected_state = recurrence(arguments)
    assert error(y, expected_y) <= Y_TOLERANCES[scan.variant]
    assert error(state, expected_state) <= STATE_TOLERANCES[scan.variant]
    assert torch.equal(arguments[6], before)


def test_it_is_no_less_accurate_than_torch(
    scan: CompiledScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in bfloat16 as well; where that is slow, torch's goes through float32
    monkeypatch.setattr(products, "has_fast_bf16", lambda: True)
    arguments = make_arguments(200, heads=8, head_dim=64, state_size=128)
    expected, _ = recurrence(arguments)
    y, _ = scan(*arguments, keep=None)
    by_torch, _ = scan_chunks(*arguments, chunk_size=CHUNK)
    assert error(y, expected) < error(by_torch, expected)


@pytest.mark.usefixtures("threads")
def test_threads_and_other_sequences_change_no_bit(scan: CompiledScan) -> None:
    arguments = make_arguments(150, batch=3, heads=8)
    torch.set_num_threads(1)
    alone = scan(*arguments, keep=None)
    torch.set_num_threads(7)  # more than groups: heads of a group are divided
    assert_same(scan(*arguments, keep=None), alone)
    x, dt, a, b, c, d, state = arguments
    one = scan(x[1:2], dt[1:2], a, b[1:2], c[1:2], d, state[1:2], keep=None)
    assert_same(one, (alone[0][1:2], alone[1][1:2]))


def test_layout_in_memory_changes_no_bit(scan: CompiledScan) -> None:
    x, dt, a, b, c, d, state = make_arguments(70, batch=2)
    expected = scan(x, dt, a, b, c, d, state, keep=None)
    assert_same(scan(x.contiguous(), dt, a, b.contiguous(), c, d, state, keep=None), expected)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    turned_dt = dt.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(scan(turned, turned_dt, a, b, c, d, state.mT.contiguous().mT, keep=None), expected)


def test_a_reset_starts_a_sequence_anew(scan: CompiledScan) -> None:
    x, dt, a, b, c, d, state = make_arguments(3 * CHUNK)
    y, after = scan(x, dt, a, b, c, d, state, keep=torch.tensor([1.0, 0.0, 1.0]))
    tail = (part[:, CHUNK:] for part in (x, dt, b, c))
    tail_x, tail_dt, tail_b, tail_c = tail
    alone = scan(tail_x, tail_dt, a, tail_b, tail_c, d, torch.zeros_like(state), keep=None)
    assert_same((y[:, CHUNK:], after), alone)


def test_zero_time_steps_leave_the_state_untouched(scan: CompiledScan) -> None:
    x, dt, a, b, c, d, state = make_arguments(CHUNK + 9)
    _, after = scan(x, dt * 0, a, b, c, d, state, keep=None)
    assert torch.equal(after, state)


def test_decays_beyond_the_float_range_stay_finite(scan: CompiledScan) -> None:
    x, dt, a, b, c, d, state = make_arguments(40)
    arguments = (x, dt * 0 + 5, a * 0 - 10, b, c, d, state)
    y, after = scan(*arguments, keep=None)
    expected_y, expected_state = recurrence(arguments)
    assert error(y, expected_y) <= Y_TOLERANCES[scan.variant]
    assert error(after, expected_state) <= STATE_TOLERANCES[scan.variant]


@pytest.mark.parametrize("position", range(5))
def test_a_nan_reaches_the_output(scan: CompiledScan, position: int) -> None:
    arguments = list(make_arguments(CHUNK + 3))
    index = (0, 1, 3, 4, 6)[position]  # x, dt, b, c, state
    part = arguments[index] = arguments[index].clone()
    part[(0,) * part.ndim] = float("nan")
    y, _ = scan(*arguments, keep=None)
    assert y[0, 0].isnan().any()


@pytest.fixture
def chosen(compiler: str) -> CompiledScan:
    found = allowed_scan()
    if found is None:
        pytest.skip("this processor has no AVX2")
    return found


def test_the_mixer_uses_it_for_bfloat16_without_gradients(
    chosen: CompiledScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, arguments = chosen, make_arguments(30)
    x, *others = arguments
    expected = scan(*arguments, keep=None)
    assert_same(ssm_scan(*arguments, chunk_size=128), expected)

    class Wrapped(Tensor):
        pass

    assert pick_scan(x, *others) is scan
    assert pick_scan(x.float(), *others) is None
    assert pick_scan(x[..., :24], *others) is None
    assert pick_scan(x.to("meta"), *others) is None
    assert pick_scan(x.as_subclass(Wrapped), *others) is None
    with_gradient = x.detach().clone().requires_grad_()
    assert pick_scan(with_gradient, *others) is None
    with torch.no_grad():
        assert pick_scan(with_gradient, *others) is scan
    for index in (2, 5):  # a and d, of parameters
        learned = [*arguments]
        learned[index] = learned[index].detach().clone().requires_grad_()
        assert pick_scan(*learned) is None
    monkeypatch.setenv("NVVL_KERNELS", "plain")
    assert pick_scan(x, *others) is None


@pytest.mark.parametrize(
    ("wanted", "fast_bf16", "names"),
    [
        ("auto", True, ["bf16", "avx512", "avx2"]),
        ("auto", False, ["avx512", "avx2"]),  # also where there are units for bfloat16
        ("avx512", False, ["avx512", "avx2"]),
        ("avx2", True, ["avx2"]),
        ("portable", True, []),
        ("plain", True, []),
    ],
)
def test_the_fastest_that_is_allowed_is_chosen(
    wanted: str, fast_bf16: bool, names: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = load_scans()
    monkeypatch.setenv("NVVL_KERNELS", wanted)
    monkeypatch.setattr(scan_module, "has_fast_bf16", lambda: fast_bf16)
    found = allowed_scan()
    assert (found and found.variant) == next((name for name in names if name in scans), None)


@pytest.mark.usefixtures("threads")
def test_slow_small_numbers_do_not_slow_it(chosen: CompiledScan) -> None:
    # decays of long ago lie below the normal floats, which multiply many times slower
    x, dt, a, b, c, d, state = make_arguments(8 * CHUNK, heads=8, head_dim=64, state_size=128)
    usual = (x, dt * 0, a, b, c, d, state)
    tiny = (x, dt * 0 + 2, a * 0 - 1, b, c, d, state)
    torch.set_num_threads(1)

    def seconds(arguments: Arguments) -> float:
        times = []
        for _ in range(5):
            began = time.thread_time()
            chosen(*arguments, keep=None)
            times.append(time.thread_time() - began)
        return min(times)

    assert seconds(tiny) < 2 * seconds(usual)


def test_gradients_still_flow(scan: CompiledScan) -> None:
    x, *rest = make_arguments(30)
    x = x.detach().clone().requires_grad_()
    ssm_scan(x, *rest, chunk_size=128)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_without_a_compiler_it_warns_once_and_torch_scans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    arguments = make_arguments(CHUNK)
    load_scans.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain torch: no C compiler: no-such-compiler"):
            found = ssm_scan(*arguments, chunk_size=CHUNK)
        assert_same(found, scan_chunks(*arguments, chunk_size=CHUNK))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ssm_scan(*arguments, chunk_size=CHUNK)
    finally:
        load_scans.cache_clear()


@pytest.mark.parametrize(
    ("groups", "heads", "threads", "expected"),
    [(8, 16, 2, 16), (1, 8, 4, 2), (2, 6, 8, 1), (2, 6, 6, 2), (1, 6, 4, 1), (1, 3, 64, 1)],
)
def test_heads_are_divided_if_threads_were_idle(
    groups: int, heads: int, threads: int, expected: int
) -> None:
    assert _heads_at_once(groups, heads, threads) == expected
