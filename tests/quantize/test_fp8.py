from typing import Any

import pytest
import torch

from nvvl.errors import CalibrationError
from nvvl.quantize import fp8

ONE = torch.tensor(1.0)
INF, NAN = float("inf"), float("nan")

# Value and E4M3 code at scale 1.
ROUNDING = [
    (0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (-1.0, 0xB8), (1.125, 0x39),
    (1.0625, 0x38), (1.1875, 0x3A), (-1.0625, 0xB8),  # ties go to the even code
    (1.96875, 0x40), (0.9765625, 0x38),  # up into the next binade
    (448.0, 0x7E), (460.0, 0x7E), (464.0, 0x7E), (480.0, 0x7E), (1e30, 0x7E),
    (-448.0, 0xFE), (-1e30, 0xFE), (INF, 0x7E), (-INF, 0xFE), (NAN, 0x7F), (-NAN, 0x7F),
    (2.0**-6, 0x08), (2.0**-9, 0x01), (2.0**-10, 0x00), (1.5 * 2.0**-10, 0x01),
    (1.5 * 2.0**-9, 0x02), (2.5 * 2.0**-9, 0x02), (7.5 * 2.0**-9, 0x08),
    (-(2.0**-10), 0x80), (1e-30, 0x00), (-1e-30, 0x80),
]  # fmt: skip


@pytest.fixture(params=["plain", "auto"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test through plain torch and the compiled kernels."""
    if request.param != "plain":
        request.getfixturevalue("compiler")
    monkeypatch.setenv("NVVL_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def oracle() -> Any:
    from nvvl.quantize import backend  # imports ModelOpt without its warnings

    assert backend
    from modelopt.torch.quantization.qtensor import FP8QTensor

    return FP8QTensor


def codes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(37, 45, generator=g)
    return {
        "random": (x * 0.02).to(dtype),
        "tied": ((x * 64).round() / 16).to(dtype),
        "tiny": (x * 1e-30).to(dtype),
        "huge": (x * 1e37).to(dtype),
        "wide range": (x * torch.exp(10 * torch.randn(37, 45, generator=g))).to(dtype),
        "one value": x[:1, :1].to(dtype),
    }


CASES = list(cases(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("value", "code"), ROUNDING)
def test_code_of_each_value_and_tie(value: float, code: int, dtype: torch.dtype) -> None:
    x = torch.tensor([value], dtype=dtype)
    if x.double().item() != value and value not in (1e30, -1e30, 1e-30, -1e-30):
        x = torch.tensor([value])  # a NaN, or a value that this dtype cannot hold
    assert codes(fp8.quantize(x, ONE)).tolist() == [code]


def test_all_codes_dequantize_as_torch_reads_them() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        values = fp8.dequantize(every, torch.tensor(0.5), dtype)
        expected = (every.float() * 0.5).to(dtype)
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.nan_to_num(), expected.nan_to_num())
        assert torch.equal(values.signbit()[:127], expected.signbit()[:127])


def test_codes_survive_a_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    for scale in (1.0, 0.0371, 1e-20):
        values = fp8.dequantize(every, torch.tensor(scale), torch.float32)
        assert torch.equal(codes(fp8.quantize(values, torch.tensor(scale))), codes(every))


def test_bf16_quotient_is_rounded_to_bf16_first() -> None:
    # 1.0625 is a tie between codes 0x38 and 0x39. In FP32 the quotient lies just above it.
    x, scale = torch.tensor([1.0625]), torch.tensor(0.9999)
    assert codes(fp8.quantize(x, scale)).item() == 0x39
    assert codes(fp8.quantize(x.bfloat16(), scale)).item() == 0x38


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_codes_are_modelopts(case: str, dtype: torch.dtype, oracle: Any) -> None:
    x = cases(dtype)[case]
    scale = fp8.scale_from_amax(x.abs().max())
    theirs, _ = oracle.quantize(x, scales=scale)
    assert torch.equal(codes(fp8.quantize(x, scale)), codes(theirs._quantized_data))
    # ModelOpt dequantizes to BF16 with a scale rounded to BF16, so only FP32 is comparable.
    back = theirs.dequantize(torch.float32, scale=scale)
    ours = fp8.dequantize(fp8.quantize(x, scale), scale, torch.float32)
    assert torch.equal(ours.view(torch.int32), back.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_fake_quantize_is_dequantize_of_quantize(case: str, dtype: torch.dtype) -> None:
    x = cases(dtype)[case]
    for scale in (torch.tensor(2e-4), ONE):
        expected = fp8.dequantize(fp8.quantize(x, scale), scale, dtype)
        ours = fp8.fake_quantize(x, scale)
        assert ours.dtype == dtype
        assert torch.equal(codes(ours), codes(expected))


def test_fake_quantize_keeps_nan_and_saturates_infinity() -> None:
    x = torch.tensor([NAN, INF, -INF, 1.0] * 8).bfloat16()
    out = fp8.fake_quantize(x, ONE).reshape(8, 4)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].tolist() == [[448.0, -448.0, 1.0]] * 8


def test_non_contiguous_and_empty_inputs() -> None:
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(3)).bfloat16()
    for view in (x.T, x[::3, 1:5], x[:0]):
        expected = fp8.quantize(view.clone(memory_format=torch.contiguous_format), ONE)
        assert torch.equal(codes(fp8.quantize(view, ONE)), codes(expected))
        assert fp8.fake_quantize(view, ONE).shape == view.shape


def test_scale_is_amax_over_448() -> None:
    scale = fp8.scale_from_amax(torch.tensor([[896.0]], dtype=torch.bfloat16))
    assert (scale.item(), scale.dtype, scale.shape) == (2.0, torch.float32, ())
    with pytest.raises(CalibrationError, match="got nan"):
        fp8.scale_from_amax(torch.tensor(NAN))


@pytest.mark.parametrize("scale", [0.0, NAN, INF, -1.0])
def test_unusable_scale_is_refused(scale: float) -> None:
    x = torch.ones(3)
    codes_of_x, useless = fp8.quantize(x, ONE), torch.tensor(scale)
    with pytest.raises(ValueError, match="scale: a value in"):
        fp8.quantize(x, useless)
    with pytest.raises(ValueError, match="scale: a value in"):
        fp8.fake_quantize(x, useless)
    with pytest.raises(ValueError, match="scale: a value in"):
        fp8.dequantize(codes_of_x, useless)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float16 or float32 was expected, got torch\.float64"):
        fp8.quantize(torch.ones(3, dtype=torch.float64), ONE)
    with pytest.raises(ValueError, match=r"float8_e4m3fn was expected, got torch\.uint8"):
        fp8.dequantize(torch.ones(3, dtype=torch.uint8), ONE)
