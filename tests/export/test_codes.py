"""The second writing of FP8 and NVFP4 against literal tables and ModelOpt's packer."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from nvvl.export import codes
from nvvl.export.value_proof import SQNR_FLOOR_DB

# magnitude -> code: the eight values, and each midpoint, which goes to the even code
E2M1 = {
    0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7,
    0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6,
}  # fmt: skip


def block_of(value: float) -> Tensor:
    """One block whose scale is 1: its largest value is 6, its tensor's amax 2688."""
    block = torch.zeros(1, 16)
    block[0, 0], block[0, 1] = 6.0, value
    return block


@pytest.mark.parametrize(("value", "code"), E2M1.items())
@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_code_of_each_value_and_tie(value: float, code: int, sign: int) -> None:
    packed, block_scale = codes.encode_nvfp4(block_of(sign * value), 1.0)
    assert float(block_scale) == 1.0
    negative = sign < 0 and value > 0
    assert int(packed[0, 0]) == 7 | (code | 8 * negative) << 4
    decoded = codes.decode_nvfp4(packed, block_scale, 1.0)
    assert abs(float(decoded[0, 1])) == next(v for v, c in E2M1.items() if c == code)


def test_block_scales_stay_in_the_range_of_e4m3() -> None:
    weight = torch.zeros(1, 48)
    weight[0, 0], weight[0, 16] = 2688.0, 1e-30
    _, block_scale = codes.encode_nvfp4(weight, 1.0)
    assert block_scale.float().tolist() == [[448.0, 2.0**-9, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1e-20, 1e-3, 1.0, 1e4])
def test_bytes_are_those_of_modelopt(dtype: torch.dtype, spread: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modelopt calls deprecated torch functions on import
        from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 96, generator=generator) * spread).to(dtype)
    weight[3] = 0
    amax = weight.abs().amax().float()
    scale = codes.scale_of(float(amax), codes.NVFP4_MAX)
    packed, block_scale = codes.encode_nvfp4(weight, scale)
    theirs, their_scale, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, torch.tensor(scale))
    assert torch.equal(packed, theirs._quantized_data)
    assert torch.equal(block_scale.view(torch.uint8), their_scale.view(torch.uint8))
    scale = codes.scale_of(float(amax), codes.E4M3_MAX)
    fp8, _ = FP8QTensor.quantize(weight, torch.tensor(scale))
    ours = codes.encode_fp8(weight, scale)
    assert torch.equal(ours.view(torch.uint8), fp8._quantized_data.view(torch.uint8))


@pytest.mark.parametrize("shape", ["normal", "uniform", "laplace", "student"])
def test_sqnr_of_weights_lies_above_the_floors(shape: str) -> None:
    torch.manual_seed(0)
    weight = {
        "normal": torch.randn(128, 256),
        "uniform": torch.rand(128, 256) * 2 - 1,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((128, 256)),
        "student": torch.distributions.StudentT(3.0).sample((128, 256)),
    }[shape].bfloat16()
    amax = float(weight.abs().amax())
    scale = codes.scale_of(amax, codes.E4M3_MAX)
    fp8 = codes.decode_fp8(codes.encode_fp8(weight, scale), scale)
    scale = codes.scale_of(amax, codes.NVFP4_MAX)
    nvfp4 = codes.decode_nvfp4(*codes.encode_nvfp4(weight, scale), scale)
    # 3 dB: the margin that the floors claim to keep below real weights
    assert sqnr_db(weight, fp8) > SQNR_FLOOR_DB["fp8"] + 3
    assert sqnr_db(weight, nvfp4) > SQNR_FLOOR_DB["nvfp4"] + 3


def sqnr_db(weight: Tensor, decoded: Tensor) -> float:
    noise = (weight.double() - decoded.double()).square().sum()
    return 10 * math.log10(float(weight.double().square().sum() / noise))
