from typing import Any

import pytest
import torch

from nvvl.errors import CalibrationError
from nvvl.quantize import nvfp4
from nvvl.quantize.formats import E2M1_VALUES

ONE = torch.tensor(1.0)
INF, NAN = float("inf"), float("nan")

# Quotient and code. Ties, at .25 .75 1.25 1.75 2.5 3.5 5, go to the even code.
ROUNDING = [
    (0.0, 0), (-0.0, 0), (0.1, 0), (0.25, 0), (0.2501, 1), (0.5, 1), (0.7499, 1),
    (0.75, 2), (1.0, 2), (1.25, 2), (1.2501, 3), (1.5, 3), (1.7499, 3),
    (1.75, 4), (2.0, 4), (2.5, 4), (2.5001, 5), (3.0, 5), (3.4999, 5),
    (3.5, 6), (4.0, 6), (5.0, 6), (5.0001, 7), (6.0, 7),
    (-0.1, 8), (-0.25, 8), (-0.2501, 9), (-0.75, 10), (-1.25, 10), (-1.5, 11),
    (-1.75, 12), (-2.5, 12), (-3.0, 13), (-3.5, 14), (-5.0, 14), (-5.0001, 15), (-6.0, 15),
]  # fmt: skip


@pytest.fixture(params=["plain", "portable", "auto"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test through plain torch, portable C and the machine's fastest kernels."""
    if request.param != "plain":
        request.getfixturevalue("compiler")
    monkeypatch.setenv("NVVL_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def oracle() -> Any:
    from nvvl.quantize import backend  # imports ModelOpt without its warnings

    assert backend
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor


def block(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(1, 16) with the given first values, then zeros."""
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]], dtype=dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def reference(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Nearest value of the table, in the fewest lines; ties to the even code; x without NaN."""
    blocks = x.float().unflatten(-1, (-1, 16))
    s8 = (blocks.abs().amax(-1, keepdim=True) / (6 * tensor_scale)).clamp(2**-9, 448)
    step = s8.to(torch.float8_e4m3fn).float() * tensor_scale
    distance = ((blocks / step).abs().clamp(max=6)[..., None] - torch.tensor(E2M1_VALUES[:8])).abs()
    best = (distance + torch.tensor([0, 1e-7] * 4)).argmin(-1)
    return (torch.tensor(E2M1_VALUES)[best] * blocks.sign() * step).flatten(-2).to(x.dtype)


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(37, 48, generator=g)
    blocks = torch.arange(37 * 3) % 5 == 0
    some_zero = x.unflatten(-1, (3, 16)).masked_fill(blocks.view(37, 3, 1), 0.0).flatten(-2)
    outlier = x * 1e-7
    outlier[5, 7], outlier[30, 2] = 0.3, -0.1
    return {
        "random": (x * 0.02).to(dtype),
        "tied": ((x * 16).round() / 8).to(dtype),
        "some zero blocks": some_zero.to(dtype),
        "tiny": (x * 1e-30).to(dtype),
        "huge": (x * 1e37).to(dtype),
        "outlier among tiny blocks": outlier.to(dtype),
        "wide range": (x * torch.exp(20 * torch.randn(37, 48, generator=g))).to(dtype),
        "subnormal": (x * 1e-39).to(dtype).masked_fill_(x > 2, 1e-30),
        "one row": x[:1, :16].to(dtype),
    }


CASES = list(cases(torch.float32))


@pytest.mark.parametrize(("value", "code"), ROUNDING)
def test_code_of_each_value_and_tie(value: float, code: int) -> None:
    # block amax 6 at tensor scale 1 makes the block scale 1, so x is the quotient itself
    packed, block_scale = nvfp4.quantize(block(6.0, value, 3.0), ONE)
    assert block_scale.float().item() == 1.0
    assert nvfp4.unpack(packed)[0, :4].tolist() == [7, code, 5, 0]


def test_golden_bytes() -> None:
    x = block(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, -0.1)
    packed, block_scale = nvfp4.quantize(torch.cat((x, x * 4, x * 0), dim=-1), ONE)
    codes = bytes.fromhex("10 32 54 76 a9 cb ed 8f")  # the even element is the low nibble
    assert packed.numpy().tobytes() == codes + codes + bytes(8)
    assert bits(block_scale).numpy().tobytes() == bytes([0x38, 0x48, 0x38])  # 1, 4, 1


def test_all_sixteen_codes_dequantize() -> None:
    packed = nvfp4.pack(torch.arange(16, dtype=torch.uint8).reshape(1, 16))
    two = torch.full((1, 1), 2.0).to(torch.float8_e4m3fn)
    values = nvfp4.dequantize(packed, two, torch.tensor(0.25), torch.float32)
    assert values.tolist() == [[v / 2 for v in E2M1_VALUES]]
    assert not torch.signbit(values[0, 8])


@pytest.mark.parametrize(
    ("amax", "tensor_scale", "code"),
    [
        (6.0, 1.0, 0x38),  # 1
        (0.0, 1.0, 0x38),  # a block of zeros: 1
        (2688.0, 1.0, 0x7E),  # 448
        (1e9, 1.0, 0x7E),  # saturates instead of becoming NaN
        (INF, 1.0, 0x7E),
        (1e-10, 1.0, 0x01),  # 2**-9 instead of 0
        (6 * 2.0**-10, 1.0, 0x01),
        (1e-38, 1e30, 0x38),  # the quotient underflows to 0, which counts as a block of zeros
        (6 * 1.0625, 1.0, 0x38),  # a tie goes to the even code
        (6 * 1.1875, 1.0, 0x3A),
        (NAN, 1.0, 0x7F),
    ],
)
def test_block_scale(amax: float, tensor_scale: float, code: int) -> None:
    _, block_scale = nvfp4.quantize(block(amax), torch.tensor(tensor_scale))
    assert bits(block_scale).tolist() == [[code]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_spoils_its_block_only(dtype: torch.dtype) -> None:
    x = torch.cat((block(1, NAN, -2), block(6, -3)), dim=-1).to(dtype)
    x = torch.cat((x, x.flip(0)), dim=0).repeat(16, 1)
    packed, block_scale = nvfp4.quantize(x, ONE)
    assert nvfp4.unpack(packed)[0, :18].tolist() == [7] * 17 + [13]
    out = nvfp4.dequantize(packed, block_scale, ONE, dtype)
    for values in (out, nvfp4.fake_quantize(x, ONE)):
        assert values[:, :16].isnan().all()
        assert torch.equal(values[:, 16:], x[:, 16:])


def test_infinity_saturates() -> None:
    x = block(INF, -INF, 1.0)
    assert nvfp4.fake_quantize(x, ONE)[0, :3].tolist() == [2688.0, -2688.0, 0.0]


def test_sign_of_a_quotient_that_underflows_is_dropped() -> None:
    # -1e-45 / 100 is -0; only its sign bit could tell it from 0
    packed, _ = nvfp4.quantize(block(600.0, -1e-45, -1e-3), ONE)
    assert nvfp4.unpack(packed)[0, :4].tolist() == [7, 0, 8, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_agrees_with_a_nearest_value_search(dtype: torch.dtype) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor_scale = nvfp4.tensor_scale_from_amax(x.abs().max())
    assert torch.equal(nvfp4.fake_quantize(x, tensor_scale), reference(x, tensor_scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_modelopts(case: str, dtype: torch.dtype, oracle: Any) -> None:
    x = cases(dtype)[case]
    tensor_scale = nvfp4.tensor_scale_from_amax(x.abs().max())
    theirs, their_block_scale, their_tensor_scale = oracle.quantize(x.clone(), 16)
    packed, block_scale = nvfp4.quantize(x, tensor_scale)
    assert torch.equal(bits(tensor_scale), bits(their_tensor_scale))
    assert torch.equal(bits(block_scale), bits(their_block_scale))
    assert torch.equal(packed, theirs._quantized_data)
    back = theirs.dequantize(
        scale=their_block_scale, double_scale=their_tensor_scale, block_sizes={-1: 16}
    )
    assert torch.equal(bits(nvfp4.dequantize(packed, block_scale, tensor_scale, dtype)), bits(back))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amax", [1e-6, 0.5, 100.0])
def test_bytes_are_modelopts_beyond_the_amax(amax: float, dtype: torch.dtype, oracle: Any) -> None:
    x = cases(dtype)["wide range"]
    tensor_scale = nvfp4.tensor_scale_from_amax(torch.tensor(amax))
    theirs, their_block_scale, _ = oracle.quantize(
        x.clone(), 16, weights_scaling_factor_2=tensor_scale
    )
    packed, block_scale = nvfp4.quantize(x, tensor_scale)
    assert torch.equal(bits(block_scale), bits(their_block_scale))
    assert torch.equal(packed, theirs._quantized_data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_fake_quantize_is_dequantize_of_quantize(case: str, dtype: torch.dtype) -> None:
    x = cases(dtype)[case]
    for amax in (0.1, 1.0):
        tensor_scale = nvfp4.tensor_scale_from_amax(torch.tensor(amax))
        expected = nvfp4.dequantize(*nvfp4.quantize(x, tensor_scale), tensor_scale, dtype)
        assert torch.equal(bits(nvfp4.fake_quantize(x, tensor_scale)), bits(expected))


def test_outliers_leave_tiny_blocks_finite_and_bounded() -> None:
    x = cases(torch.bfloat16)["outlier among tiny blocks"]
    tensor_scale = nvfp4.tensor_scale_from_amax(x.abs().max())
    packed, block_scale = nvfp4.quantize(x, tensor_scale)
    assert (block_scale.float() >= 2**-9).all()
    step = block_scale.float() * tensor_scale
    back = nvfp4.dequantize(packed, block_scale, tensor_scale, torch.float32)
    assert (back.unflatten(-1, (-1, 16)).abs() <= 6 * step.unsqueeze(-1)).all()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 48), (2, 5, 32), (0, 16), (7, 16 * 19)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed, block_scale = nvfp4.quantize(x, torch.tensor(1e-3))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert block_scale.shape == (*shape[:-1], shape[-1] // 16)
    flat = nvfp4.quantize(x.reshape(-1, 16), torch.tensor(1e-3))
    assert torch.equal(packed.flatten(), flat[0].flatten())
    assert torch.equal(bits(block_scale).flatten(), bits(flat[1]).flatten())
    assert nvfp4.fake_quantize(x, torch.tensor(1e-3)).shape == shape


def test_non_contiguous_input_is_read_in_its_own_order() -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(3)).bfloat16()
    for view in (x.T, x[::3, 1:17], x.T[:, ::2]):
        packed, block_scale = nvfp4.quantize(view, torch.tensor(1e-3))
        expected = nvfp4.quantize(view.clone(memory_format=torch.contiguous_format), ONE * 1e-3)
        assert torch.equal(packed, expected[0])
        assert torch.equal(bits(block_scale), bits(expected[1]))


def test_input_is_left_as_it_was() -> None:
    x = cases(torch.float32)["random"]
    before = x.clone()
    nvfp4.quantize(x, ONE)
    nvfp4.fake_quantize(x, ONE)
    assert torch.equal(x, before)


def test_pack_puts_the_even_index_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)


@pytest.mark.parametrize("shape", [(4, 17), (4, 8), (16, 0), ()])
def test_last_dimension_must_be_a_multiple_of_16(shape: tuple[int, ...]) -> None:
    for function in (nvfp4.quantize, nvfp4.fake_quantize):
        with pytest.raises(ValueError, match="multiple of 16, got shape"):
            function(torch.zeros(shape), ONE)


def test_mismatched_block_scales_are_refused() -> None:
    packed = torch.zeros(4, 16, dtype=torch.uint8)
    for shape in ((4, 1), (2, 4), (8,)):
        with pytest.raises(ValueError, match="one scale for every 16 codes"):
            nvfp4.dequantize(packed, torch.zeros(shape).to(torch.float8_e4m3fn), ONE)
    with pytest.raises(ValueError, match="uint8 and float8_e4m3fn were expected"):
        nvfp4.dequantize(packed, torch.zeros(4, 2), ONE)


@pytest.mark.parametrize("scale", [0.0, NAN, INF, -1.0])
def test_unusable_tensor_scale_is_refused(scale: float) -> None:
    packed, block_scale = nvfp4.quantize(block(1.0), ONE)
    useless = torch.tensor(scale)
    with pytest.raises(ValueError, match="tensor_scale: a value in"):
        nvfp4.quantize(block(1.0), useless)
    with pytest.raises(ValueError, match="tensor_scale: a value in"):
        nvfp4.fake_quantize(block(1.0), useless)
    with pytest.raises(ValueError, match="tensor_scale: a value in"):
        nvfp4.dequantize(packed, block_scale, useless)


def test_tensor_scale_is_amax_over_2688() -> None:
    scale = nvfp4.tensor_scale_from_amax(torch.tensor(2688.0, dtype=torch.bfloat16))
    assert (scale.item(), scale.dtype, scale.shape) == (1.0, torch.float32, ())
    with pytest.raises(CalibrationError, match=r"got 0\.0"):
        nvfp4.tensor_scale_from_amax(torch.tensor(0.0))
