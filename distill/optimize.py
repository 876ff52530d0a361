"""What an optimizer step moves: AdamW on the masters, a running average of them, and their saving.

Tensors go to disk whole and by name, whoever holds which slice of them: ``master.*``,
``exp_avg.*``, ``exp_avg_sq.*``, ``average.*`` and ``input_amax.*``. Slices are joined by all
processes together, so `state_tensors` and `weights` are called by each of them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.sharding import to_slice, to_whole
from nvvl.distill.student import LOG_AMAX, Student
from nvvl.model.processes import Processes

_MOMENTS = ("exp_avg", "exp_avg_sq")
INPUT_AMAX = "input_amax."


class Optimizer:
    """AdamW over a student's masters.

    Attributes:
        num_steps: Steps taken.
        average: The running average of each master; empty if the recipe has none.
    """

    def __init__(self, student: Student, recipe: DistillRecipe, processes: Processes) -> None:
        self.num_steps = 0
        self.average: dict[str, Tensor] = {}
        self._student = student
        self._recipe = recipe
        self._processes = processes
        scales = {name for name in student.masters if name.endswith(LOG_AMAX)}
        weights = [master for name, master in student.masters.items() if name not in scales]
        groups = [{"params": weights, "rate": recipe.learning_rate}] if weights else []
        if scales:
            logs = [student.masters[name] for name in scales]
            groups.append({"params": logs, "rate": recipe.scale_learning_rate, "weight_decay": 0.0})
        self._adam = torch.optim.AdamW(
            groups, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
        )
        if recipe.ema_decay:
            self.average = {n: m.detach().clone() for n, m in student.masters.items()}

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the length of the whole gradient, over all processes."""
        whole, sliced = torch.zeros(()), torch.zeros(())
        for name, master in self._student.masters.items():
            if master.grad is not None:
                square = master.grad.square().sum().cpu()
                if self._student.is_sliced(name):
                    sliced += square
                else:
                    whole += square
        return math.sqrt(float(whole + self._processes.sum(sliced)))

    @torch.no_grad()
    def step(self, norm: float) -> float:
        """Move the masters by gradients whose length is ``norm``; return the learning rate."""
        if norm > self._recipe.max_grad_norm:
            for master in self._student.masters.values():
                if master.grad is not None:
                    master.grad.mul_(self._recipe.max_grad_norm / norm)
        factor = self._recipe.rate_factor(self.num_steps)
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * factor
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.num_steps += 1
        # the first steps forget faster, so that the start does not weigh for long
        decay = min(self._recipe.ema_decay, self.num_steps / (self.num_steps + 10))
        for name, average in self.average.items():
            average.lerp_(self._student.masters[name], 1 - decay)
        self._student.refresh()
        return self._recipe.learning_rate * factor

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the masters' place for a while."""
        if not self.average:
            yield
            return
        self._swap()
        yield
        self._swap()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything a run goes on from, whole and on the CPU.

        Processes other than the main one, which saves it, take part and get the amaxes alone.
        """
        tensors: dict[str, Tensor] = {}
        for name, master in self._student.masters.items():
            parts = {"master": master.detach(), **self._moments(master)}
            if self.average:
                parts["average"] = self.average[name]
            parameter = self._student.parameter(name)
            for key, part in parts.items():
                whole = to_whole(part, parameter)
                if self._processes.is_main:
                    tensors[f"{key}.{name}"] = whole.cpu()
        return tensors | self._amaxes()

    def weights(self) -> dict[str, Tensor]:
        """Return the masters and input amaxes, as `state_tensors`, in memory of their own."""
        weights: dict[str, Tensor] = {}
        for name, master in self._student.masters.items():
            whole = to_whole(master.detach(), self._student.parameter(name))
            if self._processes.is_main:
                weights[name] = whole.to("cpu", copy=True)
        return weights | {name: amax.clone() for name, amax in self._amaxes().items()}

    def state_shapes(self, *, started: bool) -> dict[str, tuple[int, ...]]:
        """Return name and shape of what `state_tensors` gives, once ``started`` with moments."""
        parts = ["master", *(_MOMENTS if started else ()), *(["average"] if self.average else [])]
        shapes = self._shapes()
        amaxes = {name: shape for name, shape in shapes.items() if name.startswith(INPUT_AMAX)}
        return amaxes | {
            f"{part}.{name}": shape
            for name, shape in shapes.items()
            if name not in amaxes
            for part in parts
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of what `weights` gives."""
        return self._shapes()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Go on from what `state_tensors` gave after ``num_steps``.

        Args:
            tensors: Used one after the other, so that they may be read from a file meanwhile.
            num_steps: Taken until then.

        Raises:
            CheckpointError: if a file became shorter meanwhile.
            SourceError: if the system cannot read it.
            ReportedError: on other processes than the main one, in place of these.
        """
        with self._processes.agreed():
            self._copy_state(tensors, num_steps)
        self._student.refresh()

    def _copy_state(self, tensors: Mapping[str, Tensor], num_steps: int) -> None:
        self.num_steps = num_steps
        for name, master in self._student.masters.items():
            parameter = self._student.parameter(name)

            def part(key: str, name: str = name, parameter: Tensor = parameter) -> Tensor:
                return to_slice(tensors[f"{key}.{name}"], parameter)

            master.copy_(part("master"))
            if num_steps:
                moments = {key: torch.empty_like(master).copy_(part(key)) for key in _MOMENTS}
                step = torch.tensor(float(num_steps), device=master.device)
                self._adam.state[master] = {"step": step, **moments}
            if self.average:
                self.average[name].copy_(part("average"))
        for fqn, amax in self._student.amaxes.items():
            amax.copy_(tensors[f"{INPUT_AMAX}{fqn}"])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, master in self._student.masters.items():
            kept = master.detach().clone()
            master.copy_(self.average[name])
            self.average[name].copy_(kept)
        self._student.refresh()

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        moments = self._adam.state.get(master, {})
        return {key: moments[key] for key in _MOMENTS if key in moments}

    def _amaxes(self) -> dict[str, Tensor]:
        return {f"{INPUT_AMAX}{fqn}": amax for fqn, amax in self._student.amaxes.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {n: tuple(self._student.parameter(n).shape) for n in self._student.masters}
        return shapes | {name: tuple(amax.shape) for name, amax in self._amaxes().items()}
