"""Muon: momentum whose matrices are made nearly orthogonal before each step.

torch's own multiplies in bfloat16 whatever the machine: half a minute a step of the embedded model
on a CPU with AVX2 alone, of which float32 takes half a second.
"""

import math

import torch
from torch import Tensor

from nvvl.model.products import product_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that brings all singular values near 1; Jordan et al., *Muon* (2024)."""

NUM_STEPS = 5
MOMENTUM = 0.95
MATCH_ADAMW = 0.2
"""Root mean square of an update, in units of the rate: AdamW's; Liu et al., *Moonlight* (2025)."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, updates as large as AdamW's and decoupled weight decay.

    Args:
        params: matrices.
        lr: learning rate, as AdamW's.
        weight_decay: share of a weight that is taken off a step, in units of ``lr``.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonalize(weight.grad.lerp(momentum, MOMENTUM))
                size = MATCH_ADAMW * math.sqrt(max(weight.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix (M, N) near 1, by Newton-Schulz iterations."""
    x = matrix.to(product_dtype(matrix.bfloat16()))
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
