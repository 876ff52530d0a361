"""One distillation in memory: teacher, student, optimizer and data, stepped from state to state.

Each step: the step's items are packed into rows; the teacher's vision tower and embeddings make the
inputs of both models (``prepare.py``); the teacher's last hidden states, without gradient, are what
the student's are compared with (``losses.py``); gradients of all rows, and of all processes, are
summed in FP32; AdamW moves the FP32 masters; the weights are rounded again. Method and settings:
arXiv 2601.20088.

Training stops where a number is not finite or the validation loss has grown tenfold.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nvvl.distill.data import DistillData, ItemBatch
from nvvl.distill.execution import Execution
from nvvl.distill.logits import StoredLogits
from nvvl.distill.optimize import Optimizer
from nvvl.distill.prepare import Prepared, Preparer
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import Standing, StateFolder
from nvvl.distill.student import Student, require_trainable
from nvvl.distill.tensorboard import open_tensorboard
from nvvl.errors import TrainingError
from nvvl.model.load import load_model
from nvvl.model.processes import Processes
from nvvl.quantize.load import read_quantization
from nvvl.quantize.targets import list_linears

_T = TypeVar("_T")

# A validation loss this many times the first one is no noise.
_DIVERGED = 10


class Trainer:
    """Teacher, student, optimizer and data of one run."""

    def __init__(
        self,
        run: Path,
        teacher: Path,
        recipe: DistillRecipe,
        data: DistillData,
        how: Execution,
        processes: Processes,
        state: StateFolder,
        logits: StoredLogits | None,
    ) -> None:
        with processes.agreed():
            model = load_model(teacher, device=processes.device)
            formats, amaxes = read_quantization(run, list_linears(model.config))
            require_trainable(recipe, amaxes)
        self.student = Student(
            model,
            formats,
            amaxes,
            recipe,
            processes=processes,
            take_layers=logits is not None,
            shard=how.shard,
        )
        self.optimizer = Optimizer(self.student, recipe, processes)
        self.prepare = Preparer(model, recipe, device=processes.device, logits=logits)
        self._data = data
        self._recipe = recipe
        self._how = how
        self._processes = processes
        self._state = state
        self._validation: list[Prepared] = []

    def train(self) -> Standing:
        """Train from the state's step to the last."""
        recipe, progress = self._recipe, self._how.progress
        standing = self._resume() or self._begin()
        with ExitStack() as stack:
            with self._processes.agreed():
                opened = open_tensorboard(self._events_folder(), standing.step)
                events = stack.enter_context(opened)
            while standing.step < recipe.num_steps:
                record = self.step(standing.step)
                standing.step += 1
                if standing.step % recipe.validate_every == 0 or standing.step == recipe.num_steps:
                    record["validation_loss"] = self._validate_and_save(standing)
                with self._processes.agreed():
                    if self._processes.is_main:
                        self._state.log({"step": standing.step, **record})
                        events.write(standing.step, record)
                        if progress is not None:
                            progress(_describe(record, standing), standing.step, recipe.num_steps)
        return standing

    def step(self, step: int) -> dict[str, Any]:
        """Take one optimizer step and return what to log.

        Raises:
            TrainingError: if loss or gradient is not finite.
        """
        began = time.perf_counter()
        with self._processes.agreed():
            batches = self._data.training_batches(step)
        counted = torch.tensor([_num_positions(batches), sum(b.num_tokens for b in batches)])
        num_positions, num_tokens = self._processes.sum(counted).tolist()
        losses = torch.zeros(2)
        for batch, counts in self._in_turns(batches):
            prepared = self.prepare(batch)
            share = counts * prepared.num_positions / num_positions
            scale = self._processes.count if self.student.sliced else 1  # FSDP2 takes the mean
            loss, of_layers = self.prepare.loss(self.student.backbone, prepared)
            total = loss if of_layers is None else loss + self._recipe.layer_loss * of_layers
            (total * (share * scale)).backward()
            self.student.collect_gradients()
            losses += share * torch.stack([loss.detach(), total.detach()]).cpu()
        self.student.sum_gradients()
        loss_value, total_value = self._processes.sum(losses).tolist()
        norm = self.optimizer.gradient_norm()
        if not (math.isfinite(total_value) and math.isfinite(norm)):
            mine = [item_id for batch in batches for item_id in batch.item_ids]
            ids = [item_id for share in self._processes.gather(mine) for item_id in share]
            with self._processes.agreed():
                raise TrainingError(
                    f"step {step + 1}: loss {total_value}, gradient norm {norm}; items "
                    f"{', '.join(ids)}; the last validated weights are kept in "
                    f"{self._state.folder}; leave out an item that is broken, or lower "
                    "learning_rate"
                )
        rate = self.optimizer.step(norm)
        record = {"loss": loss_value, "grad_norm": norm, "learning_rate": rate}
        if self._recipe.layer_loss:
            record["loss_with_layers"] = total_value
        seconds = time.perf_counter() - began
        return record | {
            "tokens": num_tokens,
            "loss_tokens": num_positions,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
        }

    @torch.no_grad()
    def validate(self, *, step: int) -> float:
        """Return the mean loss over the tokens of the held-out items.

        Raises:
            TrainingError: if it is not finite.
        """
        if not self._validation:
            with self._processes.agreed():
                self._validation = self._prepare_validation()
        sums = torch.zeros(2, dtype=torch.float64)
        fault = ""
        for prepared, counts in self._in_turns(self._validation):
            on_device = prepared.to(self._processes.device)
            loss = float(self.prepare.loss(self.student.backbone, on_device)[0])
            if not math.isfinite(loss):
                fault = fault or f"loss {loss}; items {', '.join(prepared.item_ids)}"
            sums += counts * prepared.num_positions * torch.tensor([loss, 1.0], dtype=torch.float64)
        with self._processes.agreed():
            if fault:
                raise TrainingError(
                    f"validation at step {step}: {fault}; leave out an item that is broken, or "
                    "lower learning_rate"
                )
        total, num_positions = self._processes.sum(sums).tolist()
        return total / num_positions

    def _prepare_validation(self) -> list[Prepared]:
        """Make the held-out rows ready: the teacher's side never changes, and stays on the CPU.

        Outputs of layers are in no validation loss, and would be many times all else.
        """
        cpu = torch.device("cpu")
        batches = self._data.validation_batches()
        return [replace(self.prepare(batch), layers=()).to(cpu) for batch in batches]

    def _resume(self) -> Standing | None:
        """Load the state of an earlier start, if there is one."""
        sizes = [4 * math.prod(shape) for shape in self.optimizer.weight_shapes().values()]
        room = (8 + 2 * bool(self._recipe.ema_decay)) * sum(sizes)
        found = False
        with self._processes.agreed():
            if self._processes.is_main:
                found = self._state.open(size_bytes=room, overwrite=self._how.overwrite)
        if not self._processes.gather(found)[0]:
            return None
        with self._processes.agreed():
            standing = self._state.standing()
            shapes = self.optimizer.state_shapes(started=standing.step > 0)
            tensors = self._state.load(shapes, check_bytes=self._processes.is_main)
            if self._processes.is_main:
                self._state.trim_log(standing.step)
        self.optimizer.load_state(tensors, num_steps=standing.step)
        return standing

    def _begin(self) -> Standing:
        loss = self.validate(step=0)
        standing = Standing(step=0, start_loss=loss, best_loss=loss)
        self._save(standing, self.optimizer.weights())
        with self._processes.agreed():
            if self._processes.is_main:
                self._state.trim_log(-1)
                self._state.log({"step": 0, "validation_loss": loss})
        return standing

    def _validate_and_save(self, standing: Standing) -> float:
        if self._recipe.recalibrate_inputs:
            self.student.recalibrate()
        with self.optimizer.averaged():
            loss = self.validate(step=standing.step)
            with self._processes.agreed():
                if loss > _DIVERGED * standing.start_loss:
                    raise TrainingError(
                        f"step {standing.step}: validation loss {loss:.4g} is over {_DIVERGED} "
                        f"times the {standing.start_loss:.4g} before training; the last good "
                        f"weights are kept in {self._state.folder}; lower learning_rate and start "
                        "again with --overwrite"
                    )
            # the main process decides, for all of them take part
            is_best = self._processes.gather(standing.add(loss))[0]
            best_weights = self.optimizer.weights() if is_best else None
        self._save(standing, best_weights)
        return loss

    def _save(self, standing: Standing, best_weights: dict[str, torch.Tensor] | None) -> None:
        state = self.optimizer.state_tensors()  # all processes together
        with self._processes.agreed():
            if self._processes.is_main:
                self._state.save(standing, state, best_weights)

    def _in_turns(self, batches: Sequence[_T]) -> Iterator[tuple[_T, int]]:
        """Give batches, each with a 1; then the last again with a 0, while others still have some.

        Sliced layers are gathered by all processes together, so all run equally many.
        """
        most = len(batches)
        if self.student.sliced:
            most = int(self._processes.max(torch.tensor(most)))
        for turn in range(most):
            yield batches[min(turn, len(batches) - 1)], int(turn < len(batches))

    def _events_folder(self) -> Path | None:
        return self._how.tensorboard if self._processes.is_main else None


def _num_positions(batches: Sequence[ItemBatch]) -> int:
    return sum(batch.num_positions for batch in batches)


def _describe(record: dict[str, Any], standing: Standing) -> str:
    return (
        f"loss {record['loss']:.5f} grad {record['grad_norm']:.3f} "
        f"{record['tokens_per_second']:.0f} tokens/s "
        f"validation {standing.start_loss:.5f} -> {standing.best_loss:.5f}"
    )
