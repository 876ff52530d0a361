"""A basis in which blocks of channels round with less harm, and the gains that go with it.

The hidden states of a transformer may be turned by any orthogonal matrix ``R``: what writes them is
turned too, what reads them is turned back, and the model computes what it did (QuaRot, arXiv
2404.00456). The channels that a reader sees may also be scaled by gains that its weights undo. No
basis makes the relative error of floating-point blocks smaller, which is about -20.4 dB in NVFP4;
but one can put energy and sensitivity into different blocks. With a_c^2 the energy of channel c and
b_c^2 that of the gradients there (``sensitivity.py``), the harm under gains g is proportional to

    sum over blocks  (sum over its channels of a_c^2 g_c^2) (sum over its channels of b_c^2 / g_c^2)
      >=  sum over blocks  (sum over its channels of a_c b_c)^2,

with equality for g_c^2 = b_c / a_c (Cauchy-Schwarz). `learn_rotation` makes the lower sum small by
gradient descent over R, as SpinQuant (arXiv 2405.16406) does with the loss itself; here the model
is not run again. The error of rounded weights follows the same sum, so both errors shrink.

Shapes: D channels, a multiple of the block size; n inputs that share a basis.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvvl.distill.sensitivity import Sensitivity
from nvvl.quantize.formats import BLOCK_SIZE

# Adam finds the same sum from the identity, from a random start and from this one.
_RATE = 3e-3
# Channels that carry next to nothing get bounded gains.
_LEAST = 1e-6


def expected_harm(
    sensitivities: Sequence[Sensitivity], gains: Sequence[Tensor] | None = None
) -> float:
    """Return the sum above of inputs as they are, under the gains they have now."""
    total = 0.0
    for sensitivity, gain in zip(
        sensitivities, gains or [torch.ones(())] * len(sensitivities), strict=True
    ):
        inputs = sensitivity.inputs.diagonal() * gain.square()
        # a channel without gain carries nothing that could be harmed
        costs = sensitivity.gradients.diagonal() / gain.square()
        gradients = torch.where(gain != 0, costs, torch.zeros_like(costs))
        total += float((_blocks(inputs).sum(-1) * _blocks(gradients).sum(-1)).sum())
    return total


def learn_rotation(
    sensitivities: Sequence[Sensitivity],
    *,
    num_steps: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, float]:
    """Find one rotation for inputs that share a basis.

    Args:
        sensitivities: Of each input, all of D channels.
        num_steps: Of gradient descent.
        progress: Called with the number of each step.

    Returns:
        R, (D, D) float32 orthogonal, to be multiplied from the right; and the sum above with it.
        The identity and zero if none of the inputs matters.
    """
    live = [sensitivity for sensitivity in sensitivities if _matters(sensitivity)]
    if not live:
        like = sensitivities[0].inputs
        return torch.eye(len(like), device=like.device), 0.0
    inputs = torch.stack([s.inputs for s in live])
    gradients = torch.stack([s.gradients for s in live])
    scale = (
        inputs.diagonal(dim1=1, dim2=2).sum(1) * gradients.diagonal(dim1=1, dim2=2).sum(1)
    ).sum()
    shares = inputs / inputs.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    start = torch.linalg.eigh(shares.sum(0).double())[1].flip(1).float()
    del shares  # as large as the inputs, and these are most of what is in memory
    identity = torch.eye(len(start), device=start.device)
    free = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        harm = _least_harm(_turn(start, free, identity), inputs, gradients) / scale
        optimizer.zero_grad()
        harm.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    with torch.no_grad():
        # exactly orthogonal again, in the direction of the columns
        basis, triangle = torch.linalg.qr(_turn(start, free, identity).double())
        rotation = (basis * triangle.diagonal().sign()).float()
        return rotation, float(_least_harm(rotation, inputs, gradients))


def best_gains(sensitivity: Sensitivity, rotation: Tensor) -> Tensor:
    """Return the gains g of the channels of a turned input, (D,) float32, geometric mean 1."""
    if not _matters(sensitivity):
        return torch.ones(len(rotation), device=rotation.device)
    energy = _energies(rotation, sensitivity.inputs)
    sensitive = _energies(rotation, sensitivity.gradients)
    logs = (sensitive / energy).log() / 4
    return (logs - logs.mean()).exp()


def _matters(sensitivity: Sensitivity) -> bool:
    """Tell whether an input carries something, and the output changes with it."""
    traces = (side.diagonal().sum() for side in (sensitivity.inputs, sensitivity.gradients))
    return all(float(trace) > 0 for trace in traces)


def _turn(start: Tensor, free: Tensor, identity: Tensor) -> Tensor:
    """Return an orthogonal matrix, start at free = 0 (Cayley's transform)."""
    skew = free - free.T
    return start @ torch.linalg.solve(identity + skew, identity - skew)


def _least_harm(rotation: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the sum above under the best gains; inputs and gradients (n, D, D)."""
    products = _energies(rotation, inputs) * _energies(rotation, gradients)
    return _blocks(products.sqrt()).sum(-1).square().sum()


def _energies(rotation: Tensor, moments: Tensor) -> Tensor:
    """Return the diagonal of R^T M R, (..., D), bounded away from zero."""
    energies = (rotation * (moments @ rotation)).sum(-2)
    least = _LEAST * energies.detach().mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return torch.maximum(energies, least)


def _blocks(channels: Tensor) -> Tensor:
    return channels.unflatten(-1, (-1, BLOCK_SIZE))
