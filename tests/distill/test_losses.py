"""Chunked losses against the same losses over all logits at once, and what they keep in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvvl.distill import losses
from nvvl.distill.losses import (
    BUFFERS,
    Positions,
    TopPositions,
    chunk_positions,
    chunked_loss,
    relative_error,
    take_top,
)
from nvvl.distill.recipe import Loss

KINDS: list[Loss] = ["kl", "mse", "ce"]


def whole_loss(kind: Loss, student: Positions, teacher: Positions, targets: Tensor) -> Tensor:
    logits = student.hidden.float() @ student.head.float().T
    others = (teacher.hidden.float() @ teacher.head.float().T).detach()
    if kind == "ce":
        return F.cross_entropy(logits, targets)
    if kind == "mse":
        return F.mse_loss(logits, others)
    return F.kl_div(
        logits.log_softmax(-1), others.log_softmax(-1), reduction="batchmean", log_target=True
    )


def make_positions(
    num_positions: int, vocab_size: int, *, dtype: torch.dtype = torch.float32, size: int = 24
) -> tuple[Positions, Positions, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_positions, size, generator=generator)
    head = torch.randn(vocab_size, size, generator=generator) / 3
    other = hidden + 0.1 * torch.randn(num_positions, size, generator=generator)
    targets = torch.randint(vocab_size, (num_positions,), generator=generator)
    student = Positions(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_())
    return student, Positions(other.to(dtype), head.detach().to(dtype)), targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 5, 16, 17, 100])
def test_chunked_equals_whole_in_value_and_gradient(kind: Loss, at_once: int) -> None:
    student, teacher, targets = make_positions(17, 61)
    budget = BUFFERS * 4 * 61 * at_once

    loss = chunked_loss(kind, student, teacher=teacher, targets=targets, chunk_bytes=budget)
    (3 * loss).backward()
    found = (loss.detach(), student.hidden.grad, student.head.grad)
    student.hidden.grad = student.head.grad = None
    expected = whole_loss(kind, student, teacher, targets)
    (3 * expected).backward()

    # float32 sums of at most a thousand terms around 1, in another order
    for one, two in zip(
        found, (expected.detach(), student.hidden.grad, student.head.grad), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_the_vocabulary_change_nothing(
    kind: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, targets = make_positions(9, 61)
    before = chunked_loss(kind, student, teacher=teacher, targets=targets)
    (grad,) = torch.autograd.grad(before, student.hidden)

    monkeypatch.setattr(losses, "HEAD_ROWS", 16)
    after = chunked_loss(kind, student, teacher=teacher, targets=targets)
    (grad_after,) = torch.autograd.grad(after, student.hidden)

    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_after, grad, rtol=1e-6, atol=1e-6)


def test_kl_of_equal_positions_is_zero_with_zero_gradient() -> None:
    student, _, _ = make_positions(5, 61)
    twin = Positions(student.hidden.detach(), student.head.detach())
    loss = chunked_loss("kl", student, teacher=twin)
    loss.backward()
    assert student.hidden.grad is not None
    assert float(loss.detach()) == 0
    assert not student.hidden.grad.any()


def test_bfloat16_positions_get_float32_logits() -> None:
    student, teacher, targets = make_positions(17, 61, dtype=torch.bfloat16)
    loss = chunked_loss("kl", student, teacher=teacher, chunk_bytes=BUFFERS * 4 * 61 * 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, whole_loss("kl", student, teacher, targets), rtol=1e-6, atol=1e-6
    )


def test_frozen_head_gets_no_gradient() -> None:
    student, teacher, _ = make_positions(5, 61)
    frozen = Positions(student.hidden, student.head.detach())
    chunked_loss("kl", frozen, teacher=teacher).backward()
    assert frozen.head.grad is None


def grouped_kl(student: Positions, top: TopPositions) -> Tensor:
    """The KL of two distributions over the kept tokens and one class of all others."""
    log_probs = (student.hidden.float() @ student.head.float().T).log_softmax(-1)
    ours = log_probs.gather(-1, top.tokens)
    rest = torch.ones_like(log_probs).scatter(-1, top.tokens, 0.0)
    tail = (log_probs.exp() * rest).sum(-1, keepdim=True).log()
    theirs = torch.cat([top.log_probs, top.log_tail[:, None]], dim=-1)
    return F.kl_div(torch.cat([ours, tail], dim=-1), theirs, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("num_tokens", [1, 7, 60])
def test_top_tokens_give_the_kl_of_kept_tokens_and_tail(num_tokens: int) -> None:
    student, teacher, _ = make_positions(17, 61)
    top = take_top(teacher.hidden @ teacher.head.T, num_tokens)
    budget = BUFFERS * 4 * 61 * 5
    loss = chunked_loss("kl", student, teacher=top, chunk_bytes=budget)
    (3 * loss).backward()
    found = (loss.detach(), student.hidden.grad, student.head.grad)
    student.hidden.grad = student.head.grad = None
    expected = grouped_kl(student, top)
    (3 * expected).backward()
    for one, two in zip(
        found, (expected.detach(), student.hidden.grad, student.head.grad), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)  # tails are differences


@pytest.mark.parametrize("lead", [20.0, 97.0, 150.0])
@pytest.mark.parametrize("is_equal", [True, False])
def test_tail_that_float32_cannot_hold_has_a_finite_gradient(lead: float, is_equal: bool) -> None:
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    logits[1, 5] += lead
    theirs = logits if is_equal else logits + torch.linspace(0, 1, 64)
    top = take_top(theirs, 4)
    student = Positions(logits.clone().requires_grad_(), torch.eye(64))
    chunked_loss("kl", student, teacher=top).backward()
    exact = logits.double().requires_grad_()
    log_probs = exact.log_softmax(-1)
    ours = log_probs.gather(-1, top.tokens)
    tail = log_probs.scatter(-1, top.tokens, -torch.inf).logsumexp(-1)
    kept, rest = top.log_probs.double(), top.log_tail.double()
    loss = (kept.exp() * (kept - ours)).sum() + (rest.exp() * (rest - tail)).sum()
    (loss / 3).backward()
    assert student.hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(student.hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_weight_of_a_position_is_not_rounded_to_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    head = torch.randn(50, 32, generator=generator).bfloat16()
    teacher = Positions(torch.randn(64, 32, generator=generator).bfloat16(), head)
    gradients = []
    for share in (1.0, 1 / 3):
        student = Positions(hidden.clone().requires_grad_(), head)
        (share * chunked_loss("kl", student, teacher=teacher)).backward()
        assert student.hidden.grad is not None
        assert student.hidden.grad.dtype == torch.bfloat16
        gradients.append(student.hidden.grad.double().flatten())
    whole, third = gradients
    # each number rounds by 2**-9 at most, and the mean of 2,048 of them by far less
    assert float(whole @ third / (whole @ whole)) == pytest.approx(1 / 3, rel=3e-4)


def test_all_tokens_kept_give_the_whole_kl() -> None:
    student, teacher, targets = make_positions(9, 61)
    top = take_top(teacher.hidden @ teacher.head.T, 100)
    assert top.tokens.shape == (9, 61)
    assert torch.isneginf(top.log_tail).all()
    loss = chunked_loss("kl", student, teacher=top)
    loss.backward()
    assert student.hidden.grad is not None
    assert student.hidden.grad.isfinite().all()
    torch.testing.assert_close(
        loss, whole_loss("kl", student, teacher, targets), rtol=1e-6, atol=1e-6
    )


def test_fewer_tokens_never_give_a_larger_kl() -> None:
    student, teacher, _ = make_positions(17, 61)
    logits = teacher.hidden @ teacher.head.T
    losses = [
        float(chunked_loss("kl", student, teacher=take_top(logits, k)).detach())
        for k in (1, 4, 16, 61)
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_follows_the_formula_and_not_vocabulary_times_tokens(
    kind: Loss, live_memory: Callable[[], Any]
) -> None:
    # 131,072 x 16,384 x 5,120 with every factor divided by 32; all logits would be 8 MiB a set
    vocab_size, num_positions, size = 4096, 512, 160
    student, teacher, targets = make_positions(
        num_positions, vocab_size, size=size, dtype=torch.bfloat16
    )
    frozen = Positions(student.hidden, student.head.detach())
    chunk_bytes = 512 * 1024
    with live_memory() as memory:
        loss = chunked_loss(kind, frozen, teacher=teacher, targets=targets, chunk_bytes=chunk_bytes)
        loss.backward()
    gradient, head = 4 * num_positions * size, 4 * size * vocab_size
    # the gradient in FP32 and as handed on; hidden states in FP32 are the small rest
    assert memory.peak <= 2 * gradient + chunk_bytes + head + 2**16
    assert memory.peak > head  # the counter does count


@pytest.mark.parametrize(
    ("vocab_size", "chunk_bytes", "at_once"), [(131_072, 512 * 2**20, 170), (1000, 1, 1)]
)
def test_chunk_fits_its_budget(vocab_size: int, chunk_bytes: int, at_once: int) -> None:
    assert chunk_positions(vocab_size, chunk_bytes) == at_once


def test_missing_or_misshapen_comparison_is_refused() -> None:
    student, teacher, targets = make_positions(5, 61)
    with pytest.raises(ValueError, match="kl needs 5 positions and a vocabulary of 61"):
        chunked_loss("kl", student, targets=targets)
    with pytest.raises(ValueError, match="mse needs 5 positions"):
        chunked_loss("mse", student, teacher=Positions(teacher.hidden[:4], teacher.head))
    with pytest.raises(ValueError, match=r"ce needs \(5,\) token ids"):
        chunked_loss("ce", student, teacher=teacher)
    with pytest.raises(ValueError, match="at least one position"):
        chunked_loss("ce", Positions(student.hidden[:0], student.head), targets=targets[:0])


def test_relative_error_is_of_the_target_and_in_float32() -> None:
    target = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    error = relative_error((2 * target).requires_grad_(), target)
    assert error.dtype == torch.float32
    assert float(error.detach()) == 1
    assert float(relative_error(target, target)) == 0
