"""Sensitivities are second moments of inputs, and Fisher's information."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.prepare import Prepared, Preparer
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.sensitivity import measure_sensitivity, norm_key, values_key
from nvvl.model.processor import Processor
from nvvl.model.vlm import Layer, NemotronNanoVL

ATTENTION = 3


@pytest.fixture
def prepared(
    teacher: NemotronNanoVL, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> Prepared:
    """One item of text, one position of which counts."""
    data = DistillData(items.items, Processor.from_folder(tiny_checkpoint), recipe, seed=0)
    (batch,) = data.pack([1])
    row = Preparer(teacher, recipe, device=torch.device("cpu"))(batch)
    mask = torch.zeros_like(row.loss_mask)
    mask[0, -3] = True
    return dataclasses.replace(row, loss_mask=mask)


def last_input(teacher: NemotronNanoVL, prepared: Prepared) -> Tensor:
    """Return what the last layer reads at the position that counts, before its gain."""
    x = prepared.embeds
    for layer in teacher.language_model.backbone.layers[:-1]:
        x = layer(x, packing=prepared.packing)[0]
    wide = x[prepared.loss_mask].float()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_last_layer_is_as_sensitive_as_fishers_information(
    teacher: NemotronNanoVL, prepared: Prepared
) -> None:
    found = measure_sensitivity(teacher, [prepared] * 400)[norm_key(6)]
    x = last_input(teacher, prepared)
    # one token of the last layer is all that the prediction reads
    torch.testing.assert_close(found.inputs, x.T @ x, rtol=1e-4, atol=1e-4)

    backbone = teacher.language_model.backbone
    layer = backbone.layers[-1]
    assert isinstance(layer, Layer)
    residual = prepared.embeds
    for other in backbone.layers[:-1]:
        residual = other(residual, packing=prepared.packing)[0]

    def log_shares(plain: Tensor) -> Tensor:
        mixed, _ = layer.mixer(plain.bfloat16() * layer.norm.weight)
        hidden = backbone.norm_f(residual[prepared.loss_mask] + mixed)
        return (hidden.float() @ teacher.language_model.lm_head.weight.float().T).log_softmax(-1)[0]

    jacobian = torch.autograd.functional.jacobian(log_shares, x)[:, 0]
    fisher = jacobian.T @ (log_shares(x).exp()[:, None] * jacobian)
    # 400 draws: a twentieth of standard error, and BF16 gradients
    ratio = float(found.gradients.trace() / 400 / fisher.trace())
    assert 0.85 < ratio < 1.15
    both = torch.stack([found.gradients.flatten(), fisher.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


def test_every_layer_and_every_value_head_is_measured(
    teacher: NemotronNanoVL, prepared: Prepared
) -> None:
    found = measure_sensitivity(teacher, [prepared])
    heads = {values_key(ATTENTION, head) for head in range(2)}
    assert found.keys() == {norm_key(index) for index in range(7)} | heads
    assert all(found[key].inputs.shape == (16, 16) for key in heads)
    assert all(one.gradients.trace() > 0 for one in found.values())


def test_model_is_left_as_it_was(teacher: NemotronNanoVL, prepared: Prepared) -> None:
    measure_sensitivity(teacher, [prepared])
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(module._forward_pre_hooks for module in teacher.modules())
