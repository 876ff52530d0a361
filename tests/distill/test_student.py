"""The student computes what the run computes, and its gradients pass straight through."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvvl.distill.student import Student
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.layout import CALIBRATION_NAME
from nvvl.quantize.load import fake_quant_model, load_any, read_recipe_formats
from nvvl.quantize.pack import read_amaxes
from nvvl.quantize.recipe import Format
from nvvl.quantize.side_files import RECIPE_NAME
from nvvl.quantize.targets import list_linears, quantized_only

IN_PROJ = "language_model.backbone.layers.0.mixer.in_proj"


def read_formats(run: Path, teacher: NemotronNanoVL) -> dict[str, Format]:
    return quantized_only(read_recipe_formats(run / RECIPE_NAME, list_linears(teacher.config)))


@pytest.fixture
def student(run: Path, teacher: NemotronNanoVL) -> Student:
    formats = read_formats(run, teacher)
    return Student(teacher, formats, read_amaxes(run / CALIBRATION_NAME, formats))


@pytest.fixture
def embeds(teacher: NemotronNanoVL) -> Tensor:
    return teacher.embed(torch.arange(30, 70).reshape(2, 20)).detach()


def test_student_computes_what_server_and_modelopt_compute(
    student: Student, embeds: Tensor, run: Path, tiny_checkpoint: Path
) -> None:
    with torch.no_grad():
        hidden, _ = student.language_model.hidden_states(embeds)
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
    student.language_model.hidden_states(embeds)[0].float().square().sum().backward()
    student.collect_gradients()

    found = student.masters[f"{IN_PROJ}.weight"].grad
    assert found is not None
    assert weight.grad is not None
    assert found.dtype == torch.float32
    # the same BF16 operations in the same order
    assert torch.equal(found, weight.grad.float())


def test_gradients_of_batches_add_up_in_float32(student: Student, embeds: Tensor) -> None:
    def backward() -> None:
        student.language_model.hidden_states(embeds)[0].float().square().sum().backward()
        student.collect_gradients()

    master = student.masters[f"{IN_PROJ}.weight"]
    backward()
    assert master.grad is not None
    once = master.grad.clone()
    backward()
    assert torch.equal(master.grad, 2 * once)


def test_refresh_follows_the_masters(student: Student, embeds: Tensor) -> None:
    name = f"{IN_PROJ}.weight".removeprefix("language_model.")
    weight = student.language_model.get_parameter(name)
    before = weight.detach().clone()
    with torch.no_grad():
        student.masters[f"{IN_PROJ}.weight"].mul_(2)
        student.masters["language_model.backbone.norm_f.weight"].fill_(0.5)
    student.refresh()
    # amax and block scales double, so do the rounded values
    assert torch.equal(weight, 2 * before)
    norm = student.language_model.backbone.norm_f.weight
    assert torch.equal(norm, torch.full_like(norm, 0.5))


def test_what_is_not_trained_belongs_to_the_teacher(
    student: Student, teacher: NemotronNanoVL
) -> None:
    ours, theirs = student.language_model, teacher.language_model
    assert ours.lm_head is theirs.lm_head
    assert ours.backbone.embeddings is theirs.backbone.embeddings
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert {f"language_model.{name}" for name in trained} == set(student.masters)
    assert not any(name.endswith(("A_log", "D", "dt_bias", "conv1d.weight")) for name in trained)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(("trainable", "ndims"), [("norms", {1}), ("linears", {2})])
def test_recipe_says_what_trains(
    trainable: str, ndims: set[int], run: Path, teacher: NemotronNanoVL, embeds: Tensor
) -> None:
    formats = read_formats(run, teacher)
    amaxes = read_amaxes(run / CALIBRATION_NAME, formats)
    student = Student(teacher, formats, amaxes, trainable=[trainable])  # type: ignore[list-item]
    assert {master.ndim for master in student.masters.values()} == ndims
    with torch.no_grad():
        hidden, _ = student.language_model.hidden_states(embeds)
        served, _ = load_any(run).language_model.hidden_states(embeds)
    assert torch.equal(hidden, served)
