"""The student computes what the run computes, and its gradients pass straight through."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from nvvl.distill.backbone import PREFIX, FakeQuantLinear
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.student import Student
from nvvl.model.load import load_model
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.amaxes import CALIBRATION_NAME, read_amaxes
from nvvl.quantize.load import fake_quant_model, load_any, read_recipe_formats
from nvvl.quantize.recipe import Format
from nvvl.quantize.side_files import RECIPE_NAME
from nvvl.quantize.targets import list_linears, quantized_only

IN_PROJ = "language_model.backbone.layers.0.mixer.in_proj"


def read_formats(run: Path, teacher: NemotronNanoVL) -> dict[str, Format]:
    return quantized_only(read_recipe_formats(run / RECIPE_NAME, list_linears(teacher.config)))


MakeStudent = Callable[..., Student]


@pytest.fixture
def make_student(run: Path, teacher: NemotronNanoVL, recipe: DistillRecipe) -> MakeStudent:
    """Build a student; keywords change the recipe."""

    def make(**changes: Any) -> Student:
        formats = read_formats(run, teacher)
        amaxes = read_amaxes(run / CALIBRATION_NAME, formats)
        return Student(teacher, formats, amaxes, dataclasses.replace(recipe, **changes))

    return make


@pytest.fixture
def student(make_student: MakeStudent) -> Student:
    return make_student()


@pytest.fixture
def embeds(teacher: NemotronNanoVL) -> Tensor:
    return teacher.embed(torch.arange(30, 70).reshape(2, 20)).detach()


def test_student_computes_what_server_and_modelopt_compute(
    student: Student, embeds: Tensor, run: Path, tiny_checkpoint: Path
) -> None:
    with torch.no_grad():
        hidden, _ = student.backbone(embeds)
        served, _ = load_any(run).language_model.hidden_states(embeds)
        simulated, _ = fake_quant_model(tiny_checkpoint, run).language_model.hidden_states(embeds)
    assert torch.equal(hidden, served)
    assert torch.equal(hidden, simulated)


def test_gradients_are_those_of_modelopt_straight_through(
    student: Student, embeds: Tensor, run: Path, tiny_checkpoint: Path
) -> None:
    peer = fake_quant_model(tiny_checkpoint, run)
    weight = peer.get_submodule(IN_PROJ).weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_(True)
    peer.language_model.hidden_states(embeds)[0].float().square().sum().backward()
    student.backbone(embeds)[0].float().square().sum().backward()
    student.collect_gradients()

    found = student.masters[f"{IN_PROJ}.weight"].grad
    assert found is not None
    assert weight.grad is not None
    assert found.dtype == torch.float32
    # the same BF16 operations in the same order
    assert torch.equal(found, weight.grad.float())


def test_gradients_of_batches_add_up_in_float32(student: Student, embeds: Tensor) -> None:
    def backward() -> None:
        student.backbone(embeds)[0].float().square().sum().backward()
        student.collect_gradients()

    master = student.masters[f"{IN_PROJ}.weight"]
    backward()
    assert master.grad is not None
    once = master.grad.clone()
    backward()
    assert torch.equal(master.grad, 2 * once)


def test_refresh_follows_the_masters(student: Student, embeds: Tensor) -> None:
    weight = student.backbone.get_parameter(f"{IN_PROJ}.weight".removeprefix(PREFIX))
    before = weight.detach().clone()
    with torch.no_grad():
        student.masters[f"{IN_PROJ}.weight"].mul_(2)
        student.masters["language_model.backbone.norm_f.weight"].fill_(0.5)
    student.refresh()
    # amax and block scales double, so do the rounded values
    assert torch.equal(weight, 2 * before)
    norm = student.backbone.get_parameter("norm_f.weight")
    assert torch.equal(norm, torch.full_like(norm, 0.5))


def test_what_is_not_trained_belongs_to_the_teacher(
    student: Student, teacher: NemotronNanoVL
) -> None:
    trained = [name for name, p in student.backbone.named_parameters() if p.requires_grad]
    assert {f"{PREFIX}{name}" for name in trained} == set(student.masters)
    assert not any(name.endswith(("A_log", "D", "dt_bias", "conv1d.weight")) for name in trained)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(("trainable", "ndims"), [("norms", {1}), ("linears", {2})])
def test_recipe_says_what_trains(
    trainable: str, ndims: set[int], run: Path, make_student: MakeStudent, embeds: Tensor
) -> None:
    student = make_student(trainable=(trainable,))
    assert {master.ndim for master in student.masters.values()} == ndims
    with torch.no_grad():
        hidden, _ = student.backbone(embeds)
        served, _ = load_any(run).language_model.hidden_states(embeds)
    assert torch.equal(hidden, served)


def test_layers_that_are_taken_compute_the_same(
    student: Student, run: Path, tiny_checkpoint: Path, recipe: DistillRecipe, embeds: Tensor
) -> None:
    teacher = load_model(tiny_checkpoint)
    formats = read_formats(run, teacher)
    amaxes = read_amaxes(run / CALIBRATION_NAME, formats)
    taken = Student(teacher, formats, amaxes, recipe, take_layers=True)
    with torch.no_grad():
        assert torch.equal(taken.backbone(embeds)[0], student.backbone(embeds)[0])
    assert len(teacher.language_model.backbone.layers) == 0


def test_student_of_one_process_joins_no_others(
    make_student: MakeStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **given: joined.append(given))
    make_student().refresh()
    assert joined == []


def test_recomputed_activations_give_the_same_gradients(
    make_student: MakeStudent, embeds: Tensor
) -> None:
    gradients = []
    for recompute in (False, True):
        student = make_student(recompute=recompute)
        student.backbone(embeds)[0].float().square().sum().backward()
        student.collect_gradients()
        gradients.append({name: master.grad for name, master in student.masters.items()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


def test_learned_scales_are_one_for_query_key_and_value(
    make_student: MakeStudent, embeds: Tensor
) -> None:
    student = make_student(trainable=("input_scales",))
    attention = "language_model.backbone.layers.3.mixer"
    assert f"{attention}.q_proj.input_log_amax" in student.masters
    assert f"{attention}.k_proj.input_log_amax" not in student.masters

    # inputs of ten times the calibrated size saturate, so every scale is felt
    student.backbone(10 * embeds)[0].float().square().sum().backward()
    student.collect_gradients()
    assert all(master.grad is not None for master in student.masters.values())
    with torch.no_grad():
        for master in student.masters.values():
            master.add_(0.5)
    before = {fqn: amax.clone() for fqn, amax in student.amaxes.items()}
    student.refresh()
    for fqn, amax in student.amaxes.items():
        torch.testing.assert_close(amax, before[fqn] * math.exp(0.5))
    assert len({float(student.amaxes[f"{attention}.{x}_proj"]) for x in "qkv"}) == 1


def test_gradient_of_a_log_amax_is_that_of_the_scale_times_the_scale(
    make_student: MakeStudent, embeds: Tensor
) -> None:
    student = make_student(trainable=("input_scales",))
    linear = student.backbone.get_submodule(IN_PROJ.removeprefix(PREFIX))
    assert isinstance(linear, FakeQuantLinear)
    assert linear.scale is not None
    student.backbone(10 * embeds)[0].float().square().sum().backward()
    assert linear.scale.grad is not None
    expected = linear.scale.grad * linear.scale.detach()
    student.collect_gradients()
    assert torch.equal(_gradient(student, f"{IN_PROJ}.input_log_amax"), expected)
    assert float(expected) != 0


def test_recalibration_takes_the_largest_input_met_in_training(
    make_student: MakeStudent, embeds: Tensor
) -> None:
    student = make_student(recalibrate_inputs=True)
    with torch.no_grad():
        student.backbone(100 * embeds)  # a validation is not training
    before = float(student.amaxes[IN_PROJ])
    student.recalibrate()
    assert float(student.amaxes[IN_PROJ]) == before

    inputs: list[Tensor] = []
    linear = student.backbone.get_submodule(IN_PROJ.removeprefix(PREFIX))
    linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    student.backbone(embeds)
    student.backbone(-embeds[:1])
    student.recalibrate()
    largest = max(float(x.abs().max()) for x in inputs)
    assert float(student.amaxes[IN_PROJ]) == largest != before
    assert isinstance(linear, FakeQuantLinear)
    assert linear.scale is not None
    assert float(linear.scale) == pytest.approx(largest / (6 * 448), rel=1e-6)


def _gradient(student: Student, name: str) -> Tensor:
    gradient = student.masters[name].grad
    assert gradient is not None
    return gradient
