"""Products of bfloat16: as exact as torch's own, whichever way the CPU takes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from nvvl.model import products
from nvvl.model.products import MIN_ROWS, Linear, attention, linear


@pytest.fixture(params=[True, False], ids=["bf16 units", "no bf16 units"])
def bf16_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    units: bool = request.param
    monkeypatch.setattr(products, "has_fast_bf16", lambda: units)
    return units


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("num_rows", [1, MIN_ROWS - 1, MIN_ROWS, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_the_exact_product_rounded(
    bf16_units: bool, num_rows: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_rows, 96, generator=generator).bfloat16()
    weight = torch.randn(40, 96, generator=generator).bfloat16()
    bias = torch.randn(40, generator=generator).bfloat16() if has_bias else None
    out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, num_rows, 40)
    # half a bfloat16 step of the result, and float32 rounding of 96 sums of size up to 40
    torch.testing.assert_close(
        out.double(), exact_linear(x, weight, bias), rtol=2**-8, atol=40 * 96 * 2**-24
    )


def test_a_weight_of_several_chunks_gives_what_one_chunk_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "has_fast_bf16", lambda: False)
    x, weight = torch.randn(16, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    bias = torch.randn(50).bfloat16()
    whole = linear(x, weight, bias)
    monkeypatch.setattr(products, "_CHUNK_ELEMENTS", 32 * 7)  # 7 rows a chunk, the last has 1
    # chunks are products of other shapes, whose sums may run in another order: one bfloat16 step
    torch.testing.assert_close(linear(x, weight, bias), whole, rtol=2**-7, atol=1e-5)


def test_widened_weights_are_each_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_fast_bf16", lambda: False)
    x = torch.randn(64, 256).bfloat16()
    weights = [torch.randn(512, 256).bfloat16() for _ in range(8)]
    alone = [linear(x, weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda weight: linear(x, weight), weights * 8))
    assert all(torch.equal(a, b) for a, b in zip(alone * 8, together, strict=True))


def test_memory_taken_in_inference_mode_serves_outside_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(products, "_kept", threading.local())
    x, weight = torch.randn(16, 32).bfloat16(), torch.randn(24, 32).bfloat16()
    with torch.inference_mode():
        inside = linear(x, weight)
    assert torch.equal(linear(x, weight), inside)
    assert torch.equal(linear(x, weight.requires_grad_()).detach(), inside)


@pytest.mark.parametrize("num_rows", [2, 64])
def test_gradients_are_those_of_the_exact_product(bf16_units: bool, num_rows: int) -> None:
    layer = Linear(32, 24).bfloat16()
    x = torch.randn(num_rows, 32).bfloat16().requires_grad_()
    upstream = torch.randn(num_rows, 24).bfloat16()
    layer(x).backward(upstream)
    assert x.grad is not None
    assert layer.weight.grad is not None
    # bfloat16 results of float32 sums of at most 64 products
    torch.testing.assert_close(
        x.grad.double(), upstream.double() @ layer.weight.double(), rtol=2**-7, atol=1e-2
    )
    torch.testing.assert_close(
        layer.weight.grad.double(), upstream.double().T @ x.double(), rtol=2**-7, atol=2e-2
    )


def test_float32_is_left_to_torch(bf16_units: bool) -> None:
    x, weight = torch.randn(64, 32), torch.randn(24, 32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_attention_agrees_with_float32_attention(bf16_units: bool) -> None:
    query = torch.randn(2, 4, 9, 16).bfloat16()
    key, value = torch.randn(2, 2, 9, 16).bfloat16(), torch.randn(2, 2, 9, 16).bfloat16()
    out = attention(query, key, value, is_causal=True, enable_gqa=True)
    wide = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
    )
    assert out.dtype == torch.bfloat16
    # probabilities may be rounded to bfloat16 before they meet the values
    torch.testing.assert_close(out.float(), wide, rtol=2**-6, atol=2**-6)
