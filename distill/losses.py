"""Losses between teacher and student, computed without ever holding all logits.

Logits are the last hidden states times the head, and at a vocabulary of 131,072 they are 25 times
larger than the hidden states they come from. So positions are taken in chunks: their logits are
formed in FP32, give their part of the loss and, at once, of the gradient with respect to the
student's hidden states, and are dropped. The backward pass only scales that gradient. Logits are
therefore computed once, not twice as with recomputation.

Memory beyond the inputs, with V vocabulary, D hidden size, N positions, c of them a chunk:

    8 N D                        the gradient in FP32, and the same scaled by the backward pass
  + BUFFERS * 4 c V              the chunk: two sets of logits, probabilities, their difference
  + 4 D * min(V, HEAD_ROWS)      some rows of the head in FP32

``c`` follows from ``chunk_bytes`` (`chunk_positions`), so the middle term stays at ``chunk_bytes``
for any V and N: at V = 131,072, D = 5,120 and N = 16,384 the sum is 0.63 + 0.5 + 0.31 GiB, less
where hidden states and so the scaled gradient are BF16. A head that trains adds 8 V D.

A teacher whose logits were computed before is given as its most likely tokens (`TopPositions`). The
KL is then that of the two distributions with all other tokens counted as one: never more than the
whole KL, and equal to it where those tokens have the same shares on both sides.

The losses are means over positions: ``kl`` sum_v p_t (log p_t - log p_s) in nats, temperature 1 on
both sides (forward KL, arXiv 2601.20088); ``mse`` the mean over the vocabulary of squared
differences of logits; ``ce`` -log p_s of the next token, for which there is no teacher.

`relative_error` compares hidden states, where the outputs of layers are to agree.

Shapes: N token positions, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nvvl.distill.recipe import Loss

BUFFERS = 6
# Rows of the head, one a token of the vocabulary, that are widened at once.
HEAD_ROWS = 16384
CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Positions:
    """Hidden states of some token positions and the head that makes logits of them.

    Attributes:
        hidden: (N, D) float, after the final norm.
        head: (V, D) float, the head's weight.
    """

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class TopPositions:
    """A teacher's distribution at some token positions, its K most likely tokens alone.

    Attributes:
        tokens: (N, K) int64 ids, different at one position.
        log_probs: (N, K) float32, natural logarithms of their probabilities.
        log_tail: (N,) float32, that of the probability of all other tokens; -inf if there are none.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "TopPositions":
        return TopPositions(self.tokens[part], self.log_probs[part], self.log_tail[part])


def take_top(logits: Tensor, num_tokens: int) -> TopPositions:
    """Keep the most likely tokens of (N, V) logits."""
    log_probs = logits.float().log_softmax(-1)
    values, tokens = log_probs.topk(min(num_tokens, logits.shape[-1]), dim=-1)
    rest = log_probs.scatter(-1, tokens, -torch.inf)
    return TopPositions(tokens, values, rest.logsumexp(-1))


def chunk_positions(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return how many positions are taken at once."""
    return max(1, chunk_bytes // (BUFFERS * 4 * vocab_size))


def chunked_loss(
    kind: Loss,
    student: Positions,
    *,
    teacher: Positions | TopPositions | None = None,
    targets: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute a loss over positions, differentiable with respect to the student.

    Args:
        kind: Which loss.
        student: Its positions; gradients flow to ``hidden`` and, if it requires one, to ``head``.
        teacher: The same positions of the teacher, for ``kl`` and ``mse``; `TopPositions` for
            ``kl``.
        targets: (N,) int64 next tokens, for ``ce``.
        chunk_bytes: Memory for logits.

    Returns:
        FP32 scalar, the mean over positions.

    Raises:
        ValueError: If there are no positions, or what the loss compares with is missing or
            misshapen.
    """
    num_positions, vocab_size = len(student.hidden), len(student.head)
    if not num_positions:
        raise ValueError("student: at least one position is needed, got none")
    if kind == "ce":
        if targets is None or targets.shape != (num_positions,):
            raise ValueError(f"targets: ce needs ({num_positions},) token ids")
    elif isinstance(teacher, TopPositions):
        if kind != "kl" or len(teacher) != num_positions:
            raise ValueError(
                f"teacher: its top tokens serve kl alone, and needed {num_positions} positions"
            )
    elif teacher is None or (len(teacher.hidden), len(teacher.head)) != (num_positions, vocab_size):
        raise ValueError(
            f"teacher: {kind} needs {num_positions} positions and a vocabulary of {vocab_size}"
        )
    at_once = chunk_positions(vocab_size, chunk_bytes)
    against = targets if kind == "ce" else teacher
    loss: Tensor = _ChunkedLoss.apply(student.hidden, student.head, kind, against, at_once)  # type: ignore[no-untyped-call]
    return loss


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference over the target's mean square, a float32 scalar."""
    wide = target.float()
    return (output.float() - wide).square().mean() / wide.square().mean()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        kind: Loss,
        against: "Positions | TopPositions | Tensor",
        at_once: int,
    ) -> Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            logits = _logits(hidden[part], head)
            # each leaves d loss / d logits in the logits
            if isinstance(against, TopPositions):
                total += _kl_of_top(logits, against[part])
            elif isinstance(against, Tensor):
                total += _LOSSES[kind](logits, against[part])
            else:
                total += _LOSSES[kind](logits, _logits(against.hidden[part], against.head))
            if hidden_grad is not None:
                _add_hidden_grad(hidden_grad[part], logits, head)
            if head_grad is not None:
                head_grad.addmm_(logits.T, hidden[part].float())
        num_positions = len(hidden)
        ctx.grads = [
            None if grad is None else grad.div_(num_positions).to(like.dtype)
            for grad, like in ((hidden_grad, hidden), (head_grad, head))
        ]
        return total / num_positions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        # a number of float32, which leaves BF16 gradients BF16 and is not rounded itself
        hidden, head = (None if grad is None else grad * scale for grad in ctx.grads)
        return hidden, head, None, None, None


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return (c, V) float32: BF16 logits would round away differences as small as the KL."""
    wide = hidden.float()
    if len(head) <= HEAD_ROWS:
        return wide @ head.float().T
    logits = torch.empty(len(hidden), len(head), device=hidden.device)
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        logits[:, rows] = wide @ head[rows].float().T
    return logits


def _add_hidden_grad(grad: Tensor, logits_grad: Tensor, head: Tensor) -> None:
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        grad.addmm_(logits_grad[:, rows], head[rows].float())


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    student_log = student.log_softmax(-1)
    teacher_log = teacher.log_softmax(-1)
    probability = teacher.copy_(teacher_log).exp_()
    loss = teacher_log.sub_(student_log).mul_(probability).sum()
    student.copy_(student_log).exp_().sub_(probability)
    return loss


def _kl_of_top(student: Tensor, teacher: TopPositions) -> Tensor:
    log_probs = student.log_softmax(-1)
    top = log_probs.gather(-1, teacher.tokens)
    log_probs.scatter_(-1, teacher.tokens, -torch.inf)
    log_tail = log_probs.logsumexp(-1)
    probability, tail = teacher.log_probs.exp(), teacher.log_tail.exp()
    # a tail without any probability adds nothing, whatever its logarithm
    differences = torch.where(tail > 0, teacher.log_tail - log_tail, torch.zeros_like(tail))
    loss = (probability * (teacher.log_probs - top)).sum() + (tail * differences).sum()
    # q - p for the top tokens; for the others q, less the tail's probability shared out as q is
    student.copy_(log_probs).exp_()
    within = log_probs.sub_(torch.where(log_tail.isfinite(), log_tail, 0.0)[:, None]).exp_()
    student.sub_(within.mul_(tail[:, None]))
    student.scatter_(-1, teacher.tokens, top.exp() - probability)
    return loss


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    vocab_size = student.shape[-1]
    difference = student.sub_(teacher)
    loss = difference.square().sum() / vocab_size
    difference.mul_(2 / vocab_size)
    return loss


def _ce(student: Tensor, targets: Tensor) -> Tensor:
    student_log = student.log_softmax(-1)
    picked = targets[:, None]
    loss = -student_log.gather(-1, picked).sum()
    student.copy_(student_log).exp_()
    student.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=student.dtype))
    return loss


# Each takes float32 logits (c, V) and what they are compared with, returns the sum over positions
# and leaves its gradient in the student's logits.
_LOSSES = {"kl": _kl, "mse": _mse, "ce": _ce}
