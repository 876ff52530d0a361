import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nvvl.errors import HardwareError
from nvvl.quantize import fp8, kernels, nvfp4
from nvvl.quantize.kernels import Kernels, Variant

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float32]

needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def fast(request: pytest.FixtureRequest, compiler: str) -> Kernels:
    variant: Variant = request.param
    if variant not in kernels.list_variants():
        pytest.skip(f"this processor does not run the {variant} kernels")
    return kernels.load(variant)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make nvvl.quantize.nvfp4 and fp8 the plain torch code."""
    monkeypatch.setenv("NVVL_KERNELS", "plain")


@pytest.fixture
def no_memory_of_kernels() -> Iterator[None]:
    """Forget loaded kernels, so that they are looked for again."""
    kernels._load_fastest_or_warn.cache_clear()
    yield
    kernels._load_fastest_or_warn.cache_clear()


def random_bits(dtype: torch.dtype, count: int, *, nan: bool) -> torch.Tensor:
    """Floats of every exponent and sign, subnormals and infinities too."""
    g = torch.Generator().manual_seed(4)
    if dtype == torch.bfloat16:
        raw = torch.randint(-(2**15), 2**15, (count,), generator=g).to(torch.int16)
    else:
        raw = torch.randint(-(2**31), 2**31, (count,), generator=g).to(torch.int32)
    x = raw.view(dtype)
    return x if nan else x.masked_fill(x.isnan(), 0.0)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by what is in them; "far from zero" becomes no subnormals of FP8 at a scale of 1."""
    g = torch.Generator().manual_seed(5)
    signs = torch.randint(-1, 2, (16 * 1021,), generator=g)
    return {
        "bits": random_bits(dtype, 16 * 1021, nan=False),
        "bits with nan": random_bits(dtype, 16 * 1021, nan=True),
        "normal": torch.randn(16 * 1021, generator=g).to(dtype),
        "ties": ((torch.randn(16 * 1021, generator=g) * 16).round() / 8).to(dtype),
        "every bfloat16": torch.arange(2**16).to(torch.int16).view(torch.bfloat16).to(dtype),
        "far from zero": (signs * torch.exp2(torch.rand(16 * 1021, generator=g) * 14 - 5)).to(
            dtype
        ),
        "one block": torch.randn(16, generator=g).to(dtype),
    }


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except for the payload of a NaN that is not an FP8 code."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.dtype.itemsize]
    if expected.dtype in DTYPES:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual = actual.masked_fill(actual.isnan(), 0.0)
        expected = expected.masked_fill(expected.isnan(), 0.0)
    assert torch.equal(actual.view(width), expected.view(width))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(inputs(torch.float32)))
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-4, 2.0**-126, 2.0**119])
def test_nvfp4_kernels_agree_with_plain_torch(
    fast: Kernels, scale: float, case: str, dtype: torch.dtype
) -> None:
    x, tensor_scale = inputs(dtype)[case], torch.tensor(scale)
    packed, block_scale = nvfp4.quantize(x, tensor_scale)
    for actual, expected in zip(
        fast.nvfp4_quantize(x, float(tensor_scale)), (packed, block_scale), strict=True
    ):
        assert_same(actual, expected)
    values = nvfp4.dequantize(packed, block_scale, tensor_scale, dtype)
    assert_same(fast.nvfp4_dequantize(packed, block_scale, float(tensor_scale), dtype), values)
    assert_same(fast.nvfp4_fake_quantize(x, float(tensor_scale)), values)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(inputs(torch.float32)))
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-4, 2.0**-126, 2.0**119])
def test_fp8_kernels_agree_with_plain_torch(
    fast: Kernels, scale: float, case: str, dtype: torch.dtype
) -> None:
    x, tensor_scale = inputs(dtype)[case], torch.tensor(scale)
    codes = fp8.quantize(x, tensor_scale)
    values = fp8.dequantize(codes, tensor_scale, dtype)
    assert_same(fast.fp8_quantize(x, float(tensor_scale)), codes)
    assert_same(fast.fp8_dequantize(codes, float(tensor_scale), dtype), values)
    assert_same(fast.fp8_fake_quantize(x, float(tensor_scale)), values)


@pytest.mark.parametrize("wanted", ["plain", "auto"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, -0.0], 0.0),
        ([1.0, -3.0, 2.0], 3.0),
        ([0.5] * 99 + [-4.0], 4.0),
        ([1.0, -INF], INF),
        ([INF, NAN, 1.0], NAN),
        ([-NAN], NAN),
        ([2.0**-14], 2.0**-14),
    ],
)
def test_amax(
    values: list[float],
    expected: float,
    dtype: torch.dtype,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVVL_KERNELS", wanted)
    found = kernels.amax(torch.tensor(values, dtype=dtype))
    assert (found.dtype, found.shape) == (torch.float32, ())
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_amax_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one element was expected, got shape \[0, 4\]"):
        kernels.amax(torch.zeros(0, 4))


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bytes(fast: Kernels, dtype: torch.dtype, threads: int) -> None:
    x = torch.randn(1031, 16 * 67, generator=torch.Generator().manual_seed(6)).to(dtype)

    def run() -> list[torch.Tensor]:
        packed, block_scale = fast.nvfp4_quantize(x, 1e-3)
        codes = fast.fp8_quantize(x, 1e-2)
        return [
            packed,
            block_scale,
            fast.nvfp4_dequantize(packed, block_scale, 1e-3, dtype),
            fast.nvfp4_fake_quantize(x, 1e-3),
            codes,
            fast.fp8_dequantize(codes, 1e-2, dtype),
            fast.fp8_fake_quantize(x, 1e-2),
            fast.amax(x),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(threads)
        for actual, expected in zip(run(), alone, strict=True):
            assert_same(actual, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("numel", "threads"), [(1, 1), (1 << 16, 2), (1 << 20, 8)])
def test_small_tensors_wake_few_threads(
    monkeypatch: pytest.MonkeyPatch, numel: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert kernels._num_threads(numel) == threads


def test_only_plain_cpu_tensors_are_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(torch.Tensor):
        pass

    monkeypatch.setattr(kernels, "active", lambda: "the kernels")
    x = torch.zeros(16)
    assert kernels.pick(x, x.dtype) is not None
    assert kernels.pick(torch.nn.Parameter(x), torch.bfloat16) is not None
    assert kernels.pick(x, torch.float16) is None
    assert kernels.pick(x.as_subclass(Wrapped), x.dtype) is None
    assert kernels.pick(x.to("meta"), x.dtype) is None


def test_environment_chooses_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVVL_KERNELS", "plain")
    assert kernels.active() is None
    monkeypatch.setenv("NVVL_KERNELS", "fastest")
    with pytest.raises(
        HardwareError, match="auto, avx512, avx2, portable or plain was expected, got 'fastest'"
    ):
        kernels.active()


@needs_compiler
def test_each_variant_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = kernels.list_variants()
    assert variants[-1] == "portable"
    for variant in ("auto", *variants):
        monkeypatch.setenv("NVVL_KERNELS", variant)
        chosen = kernels.active()
        assert chosen is not None
        assert chosen.variant == (variants[0] if variant == "auto" else variant)


@needs_compiler
def test_a_variant_of_other_processors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "list_variants", lambda: ["portable"])
    kernels.load.cache_clear()
    monkeypatch.setenv("NVVL_KERNELS", "avx512")
    with pytest.raises(HardwareError, match="does not run the avx512 kernels"):
        kernels.active()


@pytest.mark.usefixtures("no_memory_of_kernels")
def test_without_a_compiler_it_warns_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv("NVVL_KERNELS", raising=False)
    x = torch.ones(1, 16)
    with pytest.warns(UserWarning, match="plain torch.*no-such-compiler is not on PATH"):
        packed, _ = nvfp4.quantize(x, torch.tensor(1 / 6))
    assert packed.tolist() == [[0x77] * 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nvfp4.quantize(x, torch.tensor(1 / 6))
