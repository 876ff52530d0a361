"""Gradients of learned input scales, against the same surrogate written with autograd."""

import pytest
import torch
from torch import Tensor

from nvvl.distill.scales import fake_quantize, round_weight
from nvvl.quantize import fp8, nvfp4
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.pack import pack_linear
from nvvl.quantize.recipe import Format


def straight_through(rounded: Tensor, smooth: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return smooth + (rounded - smooth).detach()


def surrogate(x: Tensor, scale: Tensor, linear_format: Format) -> Tensor:
    """The format as a function whose roundings have the gradient of the identity."""
    if linear_format == "fp8":
        quotient = (x / scale).clamp(-448, 448)
        code = fp8.quantize(x, scale.detach()).float()
        return straight_through(code, quotient) * scale
    _, block_scales = nvfp4.quantize(x, scale.detach())
    blocks = x.unflatten(-1, (-1, 16))
    ideal = (blocks.abs().amax(-1, keepdim=True).detach() / (6 * scale)).clamp(max=448)
    step = straight_through(block_scales.float().unsqueeze(-1), ideal) * scale
    value = nvfp4.fake_quantize(x, scale.detach()).unflatten(-1, (-1, 16))
    quotient = (blocks.detach() / step).clamp(-6, 6)
    code = straight_through(value / step.detach(), quotient)
    return (code * step).flatten(-2)


@pytest.mark.parametrize("linear_format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("clipping", [0.2, 1.0, 5.0])
def test_scale_gradient_is_that_of_the_surrogate(linear_format: Format, clipping: float) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    largest = 448 if linear_format == "fp8" else 6 * 448
    scale = (clipping * x.abs().max() / largest).requires_grad_()

    rounded = fake_quantize(x, scale, linear_format)
    (found,) = torch.autograd.grad((rounded * weights).sum(), scale)
    expected_value = surrogate(x, scale, linear_format)
    (expected,) = torch.autograd.grad((expected_value * weights).sum(), scale)
    # float32 sums of some hundred terms in another order
    torch.testing.assert_close(rounded, expected_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs()))
    assert float(expected) != 0


def test_block_scale_at_its_least_follows_the_tensor_scale() -> None:
    x = torch.full((1, 16), 0.004)
    scale = torch.tensor(1.0, requires_grad=True)
    rounded = fake_quantize(x, scale, "nvfp4")
    (found,) = torch.autograd.grad(rounded.sum(), scale)
    # block scale 2**-9 whatever the scale is: codes 0.004 * 512 = 2.05 are 2, and the slope of
    # 2 * 2**-9 * S - x through a straight-through code is code - x / step, times 2**-9
    expected = 16 * (2 - 0.004 * 512) / 512
    assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("linear_format", ["fp8", "nvfp4"])
def test_too_small_a_scale_is_pushed_up(linear_format: Format) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    largest = 448 if linear_format == "fp8" else 6 * 448
    scale = (0.3 * x.abs().max() / largest).requires_grad_()
    (fake_quantize(x, scale, linear_format) - x).square().sum().backward()
    assert scale.grad is not None
    assert float(scale.grad) < 0


def test_gradient_of_x_passes_straight_through() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (5 * fake_quantize(x, torch.tensor(1e-4), "nvfp4")).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 5))


@pytest.mark.parametrize("linear_format", ["fp8", "nvfp4", "nvfp4-w4a16"])
def test_rounded_weight_is_what_is_packed(linear_format: Format) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    amax = 1.5 * weight.abs().amax().float()  # as of q, k and v together
    packed = pack_linear(weight, linear_format, Amax(amax))
    if linear_format == "fp8":
        expected = fp8.dequantize(packed["weight"], packed["weight_scale"])
    else:
        codes, block_scale = packed["weight"], packed["weight_scale"]
        expected = nvfp4.dequantize(codes, block_scale, packed["weight_scale_2"])
    rounded = round_weight(weight, linear_format, amax)
    assert torch.equal(rounded, expected)
    halves = [round_weight(half, linear_format, amax) for half in weight.split(4)]
    assert torch.equal(torch.cat(halves), rounded)
