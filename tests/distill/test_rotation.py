"""Rotations and gains: what they promise of the error of NVFP4, and that it holds."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvvl.distill.rotation import best_gains, expected_harm, learn_rotation
from nvvl.distill.sensitivity import Sensitivity
from nvvl.quantize import nvfp4

SIZE = 64


def orthogonal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]


def draw(shares: Tensor, basis: Tensor, seed: int) -> Tensor:
    """Draw vectors whose energy along the columns of a basis is given."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4096, SIZE, generator=generator) * shares.sqrt()) @ basis.T


def make_sensitivity(x: Tensor, u: Tensor) -> Sensitivity:
    found = Sensitivity(SIZE, torch.device("cpu"))
    found.add(x, u)
    return found


def planted(*, turned: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and gradients with their energy in few directions, not the same ones."""
    steps = torch.arange(SIZE).float()
    return draw(0.9**steps, turned, 1), draw(0.9 ** ((steps + 40) % SIZE), turned, 2)


def measured_harm(x: Tensor, u: Tensor) -> float:
    """Return the mean squared effect of rounding x to NVFP4, over all pairs of tokens."""
    error = nvfp4.fake_quantize(x, nvfp4.tensor_scale_from_amax(x.abs().max())) - x
    return float((error @ u.T).square().mean())


def test_learned_rotation_is_orthogonal_and_as_good_as_the_planted_one() -> None:
    basis = orthogonal(0)
    x, u = planted(turned=basis)
    sensitivity = make_sensitivity(x, u)
    rotation, harm = learn_rotation([sensitivity], num_steps=400)
    # float32 products of 64 terms
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(SIZE), rtol=0, atol=1e-5)
    assert harm < 0.6 * expected_harm([sensitivity])
    known = make_sensitivity(x @ basis, u @ basis)
    gains = best_gains(known, torch.eye(SIZE))
    assert harm < 1.02 * expected_harm([known], [gains])


def test_harm_of_learned_basis_is_that_of_its_gains() -> None:
    x, u = planted(turned=orthogonal(0))
    rotation, harm = learn_rotation([make_sensitivity(x, u)], num_steps=20)
    turned = make_sensitivity(x @ rotation, u @ rotation)
    gains = best_gains(make_sensitivity(x, u), rotation)
    # the bound is reached up to float32
    assert abs(expected_harm([turned], [gains]) / harm - 1) < 1e-4
    assert abs(float(gains.log().mean())) < 1e-5


def test_error_of_nvfp4_shrinks_as_expected() -> None:
    x, u = planted(turned=orthogonal(0))
    rotation, harm = learn_rotation([make_sensitivity(x, u)], num_steps=400)
    gains = best_gains(make_sensitivity(x, u), rotation)
    before = measured_harm(x, u)
    after = measured_harm((x @ rotation) * gains, (u @ rotation) / gains)
    expected = harm / expected_harm([make_sensitivity(x, u)])
    # the largest of a block varies from token to token, which second moments do not know
    assert abs(after / before / expected - 1) < 0.15


def test_one_rotation_serves_all_inputs_that_share_a_basis() -> None:
    basis = orthogonal(0)
    both = [make_sensitivity(*planted(turned=basis)), make_sensitivity(*planted(turned=-basis))]
    rotation, harm = learn_rotation(both, num_steps=100)
    alone = [learn_rotation([one], num_steps=100)[1] for one in both]
    assert harm < 1.05 * sum(alone)
    assert rotation.shape == (SIZE, SIZE)


def test_learning_holds_six_matrices_of_each_input(live_memory: Callable[[], Any]) -> None:
    inputs = [make_sensitivity(*planted(turned=orthogonal(seed))) for seed in range(24)]
    with live_memory() as memory:
        learn_rotation(inputs, num_steps=2)
    # beside the two that are given; and a few for all of them together
    assert memory.peak < (6 * len(inputs) + 15) * SIZE * SIZE * 4


def test_channels_without_energy_get_finite_gains() -> None:
    x, u = planted(turned=torch.eye(SIZE))
    x[:, :16], u[:, 8:24] = 0, 0
    sensitivity = make_sensitivity(x, u)
    rotation, _ = learn_rotation([sensitivity], num_steps=5)
    assert rotation.isfinite().all()
    assert best_gains(sensitivity, torch.eye(SIZE)).isfinite().all()


def test_input_that_nothing_depends_on_is_left_out() -> None:
    x, u = planted(turned=orthogonal(0))
    live, dead = make_sensitivity(x, u), make_sensitivity(x, torch.zeros_like(u))
    alone, harm = learn_rotation([live], num_steps=5)
    beside, same = learn_rotation([dead, live], num_steps=5)
    assert torch.equal(alone, beside)
    assert harm == same
    rotation, nothing = learn_rotation([dead], num_steps=5)
    assert torch.equal(rotation, torch.eye(SIZE))
    assert nothing == 0
    assert torch.equal(best_gains(dead, rotation), torch.ones(SIZE))


def test_channel_whose_gain_is_zero_harms_nothing() -> None:
    x, u = planted(turned=torch.eye(SIZE))
    gain = torch.ones(SIZE)
    gain[3], u[:, 3] = 0, 0
    assert math.isfinite(expected_harm([make_sensitivity(x, u)], [gain]))
