from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvvl.quantize import fp8, nvfp4, rounding


@pytest.mark.parametrize(
    ("linear_format", "expected"),
    [
        ("fp8", fp8.fake_quantize),
        ("nvfp4", nvfp4.fake_quantize),
        ("nvfp4-w4a16", nvfp4.fake_quantize),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_format_rounds_as_its_own_module(
    linear_format: str, expected: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor(0.01)
    rounded = rounding.fake_quantize(x, scale, linear_format)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, expected(x, scale))


@pytest.mark.parametrize("linear_format", ["bf16", "fp8-per-channel"])
def test_other_formats_are_refused(linear_format: str) -> None:
    with pytest.raises(ValueError, match=f"{linear_format} is not a quantized format"):
        rounding.fake_quantize(torch.zeros(1, 16), torch.tensor(1.0), linear_format)
