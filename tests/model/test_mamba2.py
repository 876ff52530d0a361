"""The chunked Mamba2 scan against the recurrence it stands for, one token after the other.

Tolerance in float32: 1e-5 of the largest value. Both sides round at 6e-8 but sum in different
orders over some tens of tokens; a wrong decay, mask or group would show at 1e-2 and above.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvvl.model.mamba2 import CPU_CHUNK_SIZE, CPU_SPAN, causal_conv, scan_chunks, ssm_scan, ssm_step

TOLERANCE = 1e-5
BATCH, HEAD_DIM, STATE_SIZE = 2, 5, 7

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Scan = Callable[..., tuple[Tensor, Tensor]]

both_scans = pytest.mark.parametrize("scan", [ssm_scan, scan_chunks])


def make_arguments(
    length: int, *, heads: int = 4, groups: int = 2, zero_state: bool = False, seed: int = 0
) -> Arguments:
    """Draw x, dt, a, b, c, d and state; decays of a token range from weak to strong."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = draw(BATCH, heads, HEAD_DIM, STATE_SIZE)
    return (
        draw(BATCH, length, heads, HEAD_DIM),
        torch.nn.functional.softplus(draw(BATCH, length, heads) - 2),
        -torch.exp(1.5 * draw(heads)),
        draw(BATCH, length, groups, STATE_SIZE),
        draw(BATCH, length, groups, STATE_SIZE),
        draw(heads),
        state * 0 if zero_state else state,
    )


def recurrence(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply `ssm_step` token by token."""
    outputs = []
    for x_t, dt_t, b_t, c_t in zip(*(part.split(1, 1) for part in (x, dt, b, c)), strict=True):
        y, state = ssm_step(x_t, dt_t, a, b_t, c_t, d, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def by_the_formula(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in float64 with one Python loop a head, as the paper writes it."""
    state, y = state.double(), torch.empty(x.shape, dtype=torch.float64)
    heads_per_group = x.shape[2] // b.shape[2]
    for row in range(x.shape[0]):
        for head in range(x.shape[2]):
            h, group = state[row, head], head // heads_per_group
            for t in range(x.shape[1]):
                x_t, step = x[row, t, head].double(), dt[row, t, head].double()
                update = step * torch.outer(x_t, b[row, t, group].double())
                h = torch.exp(step * a[head].double()) * h + update
                y[row, t, head] = h @ c[row, t, group].double() + d[head].double() * x_t
            state[row, head] = h
    return y, state


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def norm_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_recurrence_is_the_published_formula() -> None:
    arguments = make_arguments(6)
    for value, expected in zip(recurrence(*arguments), by_the_formula(*arguments), strict=True):
        assert relative_error(value, expected) <= TOLERANCE


@both_scans
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "chunk_size"),
    [
        (1, 8),
        (5, 8),
        (8, 8),
        (9, 8),
        (16, 8),
        (23, 8),
        (7, 1),
        (2 * CPU_CHUNK_SIZE + 1, 256),
        (CPU_SPAN + 3, 128),
    ],
)
def test_scan_equals_recurrence(scan: Scan, length: int, chunk_size: int, groups: int) -> None:
    arguments = make_arguments(length, groups=groups)
    y, state = scan(*arguments, chunk_size=chunk_size)
    expected_y, expected_state = recurrence(*arguments)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, expected_y) <= TOLERANCE
    assert relative_error(state, expected_state) <= TOLERANCE


@both_scans
def test_scan_starts_from_an_empty_state(scan: Scan) -> None:
    arguments = make_arguments(19, zero_state=True)
    for value, expected in zip(scan(*arguments, chunk_size=8), recurrence(*arguments), strict=True):
        assert relative_error(value, expected) <= TOLERANCE


@both_scans
def test_zero_time_steps_leave_the_state_untouched(scan: Scan) -> None:
    x, dt, a, b, c, d, state = make_arguments(19)
    _, after = scan(x, dt * 0, a, b, c, d, state, chunk_size=8)
    assert torch.equal(after, state)
    dt[:, :11] = 0  # as on left padding: only the tokens after it count
    _, after = scan(x, dt, a, b, c, d, state, chunk_size=8)
    _, expected = recurrence(x[:, 11:], dt[:, 11:], a, b[:, 11:], c[:, 11:], d, state)
    assert relative_error(after, expected) <= TOLERANCE


@both_scans
def test_decays_beyond_the_float_range_stay_exact(scan: Scan) -> None:
    # a total decay of exp(-2000): its inverse, which a factored form would need, overflows
    x, dt, a, b, c, d, state = make_arguments(40)
    dt = dt * 0 + 5.0
    a = a * 0 - 10.0
    y, after = scan(x, dt, a, b, c, d, state, chunk_size=32)
    expected_y, expected_state = recurrence(x, dt, a, b, c, d, state)
    assert relative_error(y, expected_y) <= TOLERANCE
    assert relative_error(after, expected_state) <= TOLERANCE


@both_scans
def test_bfloat16_scan_is_close_and_keeps_a_float32_state(scan: Scan) -> None:
    x, dt, a, b, c, d, state = make_arguments(100)
    x, b, c = x.bfloat16(), b.bfloat16(), c.bfloat16()
    y, after = scan(x, dt, a, b, c, d, state, chunk_size=32)
    expected_y, expected_state = scan(
        x.float(), dt, a, b.float(), c.float(), d, state, chunk_size=32
    )
    assert y.dtype == after.dtype == torch.float32
    # three roundings at 2^-9 on the way to y; none on the way to the state
    assert norm_error(y, expected_y) < 3 * 2**-9
    assert relative_error(after, expected_state) <= TOLERANCE


@both_scans
@pytest.mark.parametrize("zeroed", [0, 11])
def test_gradients_equal_those_of_the_recurrence(scan: Scan, zeroed: int) -> None:
    arguments = make_arguments(19)
    arguments[1][:, :zeroed] = 0
    weights = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1))

    def gradients(run: Scan, **options: int) -> tuple[Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in arguments]
        y, state = run(*leaves, **options)
        return torch.autograd.grad((y * weights).sum() + state.square().sum(), leaves)

    values, expected = gradients(scan, chunk_size=8), gradients(recurrence)
    names = ["x", "dt", "a", "b", "c", "d", "state"]
    for name, one, other in zip(names, values, expected, strict=True):
        assert torch.isfinite(one).all(), name
        assert relative_error(one, other) <= 10 * TOLERANCE, name  # sums over many more terms


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("has_bias", [True, False])
def test_convolution_reads_the_state_and_the_tokens_so_far(length: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 6, generator=generator)
    weight = torch.randn(6, 1, 4, generator=generator)
    bias = torch.randn(6, generator=generator) if has_bias else None
    before = torch.randn(2, 6, 3, generator=generator)
    out, after = causal_conv(x, weight, bias, before)
    inputs = torch.cat([before, x.transpose(1, 2)], dim=2)
    for t in range(length):
        expected = (inputs[:, :, t : t + 4] * weight[:, 0]).sum(-1)
        expected = expected if bias is None else expected + bias
        assert relative_error(out[:, t], expected) <= TOLERANCE
    assert torch.equal(after, inputs[:, :, -3:])


def test_convolution_state_does_not_keep_the_prompt_alive() -> None:
    x = torch.randn(1, 50, 6)
    _, after = causal_conv(x, torch.randn(6, 1, 4), None, torch.zeros(1, 6, 3))
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size()
