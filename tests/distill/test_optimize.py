"""The optimizer step: clipping, rates, averages, and what is saved."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvvl.distill.optimize import Optimizer
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import Standing, StateFolder
from nvvl.distill.student import LOG_AMAX, Student
from nvvl.model.processes import Processes
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.amaxes import CALIBRATION_NAME, read_amaxes
from nvvl.quantize.load import read_recipe_formats
from nvvl.quantize.side_files import RECIPE_NAME
from nvvl.quantize.targets import list_linears, quantized_only

Make = Callable[..., tuple[Student, Optimizer]]


@pytest.fixture
def make(run: Path, teacher: NemotronNanoVL, recipe: DistillRecipe) -> Make:
    """Build a student and its optimizer; keywords change the recipe."""
    formats = quantized_only(read_recipe_formats(run / RECIPE_NAME, list_linears(teacher.config)))
    amaxes = read_amaxes(run / CALIBRATION_NAME, formats)

    def build(**changes: Any) -> tuple[Student, Optimizer]:
        changed = dataclasses.replace(recipe, **changes)
        student = Student(teacher, formats, amaxes, changed)
        return student, Optimizer(student, changed, Processes("cpu"))

    return build


def set_gradients(student: Student, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for master in student.masters.values():
        master.grad = torch.randn(master.shape, generator=generator)


def test_other_processes_keep_nothing_of_what_is_saved(make: Make, recipe: DistillRecipe) -> None:
    student, optimizer = make()
    other = Processes("cpu")
    other.index = 1
    for give in (Optimizer.state_tensors, Optimizer.weights):
        assert len(give(optimizer)) > len(student.amaxes)
        assert len(give(Optimizer(student, recipe, other))) == len(student.amaxes)


def test_norm_is_that_of_all_gradients_together(make: Make) -> None:
    student, optimizer = make()
    set_gradients(student, 0)
    gradients = [m.grad.flatten() for m in student.masters.values() if m.grad is not None]
    assert optimizer.gradient_norm() == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-5)


def test_long_gradients_are_cut_to_the_recipe_s_length(make: Make) -> None:
    # AdamW's first step does not feel the length, its moments do
    student, optimizer = make(max_grad_norm=0.5, warmup_fraction=0.0)
    set_gradients(student, 0)
    norm = optimizer.gradient_norm()
    assert norm > 0.5
    optimizer.step(norm)
    moments = [t for n, t in optimizer.state_tensors().items() if n.startswith("exp_avg.")]
    length = math.sqrt(sum(float(t.square().sum()) for t in moments)) / 0.1  # 1 - beta1
    assert length == pytest.approx(0.5, rel=1e-4)


def test_scales_have_a_rate_of_their_own(make: Make) -> None:
    student, optimizer = make(
        trainable=("linears", "input_scales"), scale_learning_rate=0.25, warmup_fraction=0.0
    )
    before = {name: master.detach().clone() for name, master in student.masters.items()}
    set_gradients(student, 0)
    optimizer.step(1.0)
    for name, master in student.masters.items():
        moved = (master.detach() - before[name]).abs()
        expected = 0.25 if name.endswith(LOG_AMAX) else 1e-3  # AdamW's first step is the rate
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=0.01, atol=1e-6)


def test_average_is_what_is_seen_inside_averaged_alone(make: Make) -> None:
    student, optimizer = make(ema_decay=0.75, warmup_fraction=0.0)
    name = next(iter(student.masters))
    history = [student.masters[name].detach().clone()]
    for seed in range(3):
        set_gradients(student, seed)
        optimizer.step(1.0)
        history.append(student.masters[name].detach().clone())
    average = history[0]
    for number, values in enumerate(history[1:], start=1):
        decay = min(0.75, number / (number + 10))
        average = average + (1 - decay) * (values - average)
    with optimizer.averaged():
        torch.testing.assert_close(student.masters[name].detach(), average, rtol=1e-6, atol=1e-7)
        assert torch.equal(optimizer.weights()[name], student.masters[name])
    assert torch.equal(student.masters[name], history[-1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"trainable": ("norms", "input_scales")}],
    ids=["plain", "average", "scales"],
)
def test_loaded_state_goes_on_bit_for_bit(changes: dict[str, Any], make: Make) -> None:
    student, optimizer = make(**changes)
    for seed in range(3):
        set_gradients(student, seed)
        optimizer.step(1.0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert optimizer.state_shapes(started=True) == shapes

    other, loaded = make(**changes)
    loaded.load_state(saved, num_steps=3)
    for seed in range(3, 6):
        for one, opt in ((student, optimizer), (other, loaded)):
            set_gradients(one, seed)
            opt.step(1.0)
    ours, theirs = optimizer.state_tensors(), loaded.state_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class WatchedTensors(Mapping[str, Tensor]):
    """Counts the tensors that were given and are alive."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.most = 0
        self._tensors = tensors
        self._given: list[weakref.ref[Tensor]] = []

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._given.append(weakref.ref(tensor))
        self.most = max(self.most, sum(ref() is not None for ref in self._given))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_state_is_loaded_from_disk_a_tensor_at_a_time(make: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"ema_decay": 0.9, "trainable": ("linears", "norms", "input_scales")}
    student, optimizer = make(**changes)
    for seed in range(3):
        set_gradients(student, seed)
        optimizer.step(1.0)
    state = StateFolder(tmp_path / "s", {})
    state.open(size_bytes=0, overwrite=False)
    state.save(Standing(3, 1.0, 1.0, 3), optimizer.state_tensors(), optimizer.weights())
    watched = WatchedTensors(state.load(optimizer.state_shapes(started=True)))

    _, loaded = make(**changes)
    loaded.load_state(watched, num_steps=3)
    assert watched.most == 1
    ours, theirs = optimizer.state_tensors(), loaded.state_tensors()
    assert len(watched) == len(ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_stay_as_they_were_when_they_were_taken(make: Make) -> None:
    student, optimizer = make(trainable=("linears", "norms", "input_scales"))
    taken = optimizer.weights()
    before = {name: tensor.clone() for name, tensor in taken.items()}
    set_gradients(student, 0)
    optimizer.step(1.0)
    assert all(torch.equal(taken[name], before[name]) for name in before)
    assert not all(torch.equal(optimizer.weights()[name], before[name]) for name in before)
