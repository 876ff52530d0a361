"""Quantization-aware distillation, from a PTQ run to a better checkpoint of the same format.

    check run -> student, teacher, data -> steps, validating now and then -> best weights -> OUT

Each step: the teacher's vision tower and embeddings make the inputs of both models; the teacher's
last hidden states, without gradient, are what the student's are compared with (``losses.py``);
gradients of all batches of the step are summed in FP32; AdamW moves the FP32 masters; the weights
are rounded again. Method and settings: arXiv 2601.20088.

The outcome is chosen by the validation loss on held-out items, among the weights of every
validation and those the run started with: where training helps nothing, the run comes out as it
went in. Training stops where a number is not finite or the validation loss has grown tenfold.

One process and one device. Not done: sharding over devices, packing several items in a row,
recomputation of activations.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData, LossBatch
from nvvl.distill.losses import Rows, chunked_loss
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import LOG_NAME, Standing, StateFolder
from nvvl.distill.student import Student
from nvvl.distill.teacher import check_run
from nvvl.distill.write import write_bf16, write_quantized
from nvvl.errors import TrainingError
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.layout import CALIBRATION_NAME
from nvvl.quantize.load import read_recipe_formats
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.pack import read_amaxes
from nvvl.quantize.side_files import RECIPE_NAME
from nvvl.quantize.staging import MANIFEST_NAME, staged_folder
from nvvl.quantize.targets import list_linears, quantized_only

# (what is shown, steps done, steps in total)
Progress = Callable[[str, int, int], None]

# A validation loss this many times the first one is no noise.
_DIVERGED = 10


@dataclass(frozen=True)
class DistillResult:
    """What came out.

    Attributes:
        manifest: Of the quantized checkpoint.
        bf16: Folder of the trained BF16 weights.
        start_loss: Validation loss before training.
        best_loss: That of the weights that were written.
        best_step: The step they were reached at; 0 if training did not help.
    """

    manifest: Manifest
    bf16: Path
    start_loss: float
    best_loss: float
    best_step: int


def distill(
    run: Path,
    teacher: Path,
    out: Path,
    recipe: DistillRecipe,
    items: CalibrationSet,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> DistillResult:
    """Train a run's weights towards their BF16 teacher, and write them in the run's format.

    A run that was interrupted goes on from ``OUT.train`` when called again with the same settings.

    Args:
        run: What ``nvvl quantize`` wrote.
        teacher: The BF16 checkpoint it was made from.
        out: The folder to make; the trained BF16 weights go to ``OUT.bf16`` beside it.
        recipe: Settings of the training.
        items: What to train and validate on.
        seed: Of the split and order of items.
        device: Where both models are.
        overwrite: Replace earlier outputs, and discard the state of an unfinished run.
        progress: Called after each step.
        command: The command line, for the manifest.

    Raises:
        ConfigError: if run and teacher are of different models.
        CheckpointError: if the run is not what its manifest says, or of another teacher.
        DataError: if an item cannot be used, or none is left to train on.
        TrainingError: if a loss is not finite, or training diverges.
        OutputError: if an output exists, holds another run, or does not fit on the disk.
        KeyboardInterrupt: again, saying how to go on.
    """
    _warn_about_rate(recipe)
    out = out.absolute()
    bf16 = out.with_name(f"{out.name}.bf16")
    identity = _identity(run, teacher, recipe, items, seed)
    with (
        staged_folder(out, source=run, overwrite=overwrite) as out_partial,
        staged_folder(bf16, source=teacher, overwrite=overwrite) as bf16_partial,
    ):
        trainer = _Trainer(run, teacher, recipe, items, seed, torch.device(device))
        state = StateFolder(out.with_name(f"{out.name}.train"), identity)
        try:
            standing = trainer.train(state, overwrite=overwrite, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the last validated step is kept in {state.folder}, and the same "
                "command goes on from there"
            ) from None
        record = identity | {
            "validation_loss": {"start": standing.start_kl, "written": standing.best_kl},
            "step": standing.best_step,
        }
        (out_partial / f"distill_{LOG_NAME}").write_bytes(state.log_path.read_bytes())
        write_bf16(
            teacher,
            bf16_partial,
            trainer.student.masters,
            distillation=record,
            command=command,
        )
        manifest = write_quantized(
            bf16_partial, run, out_partial, distillation=record, command=command
        )
    state.discard()
    return DistillResult(manifest, bf16, standing.start_kl, standing.best_kl, standing.best_step)


@dataclass(frozen=True)
class _Prepared:
    """A batch with everything that does not depend on the student.

    Attributes:
        item_ids: Of the rows.
        embeds: (B, T, hidden).
        padding_mask: (B, T) bool.
        loss_mask: (B, T) bool, N positions of it True.
        teacher_hidden: (N, hidden), the teacher's at those positions.
        targets: (N,) int64, the tokens that come next.
    """

    item_ids: tuple[str, ...]
    embeds: Tensor
    padding_mask: Tensor
    loss_mask: Tensor
    teacher_hidden: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "_Prepared":
        """Move the tensors."""
        tensors = [
            tensor.to(device)
            for tensor in (
                self.embeds,
                self.padding_mask,
                self.loss_mask,
                self.teacher_hidden,
                self.targets,
            )
        ]
        return _Prepared(self.item_ids, *tensors)


class _Trainer:
    """Teacher, student, optimizer and data of one run."""

    def __init__(
        self,
        run: Path,
        teacher: Path,
        recipe: DistillRecipe,
        items: CalibrationSet,
        seed: int,
        device: torch.device,
    ) -> None:
        self.teacher: NemotronNanoVL = load_model(teacher, device=device)
        formats = quantized_only(
            read_recipe_formats(run / RECIPE_NAME, list_linears(self.teacher.config))
        )
        amaxes = read_amaxes(run / CALIBRATION_NAME, formats)
        self.student = Student(self.teacher, formats, amaxes, trainable=recipe.trainable)
        self.optimizer = torch.optim.AdamW(
            list(self.student.masters.values()),
            lr=recipe.learning_rate,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
        )
        processor = Processor.from_folder(teacher)
        self.data = DistillData(items.items, processor, recipe, seed=seed)
        self._recipe = recipe
        self._device = device
        self._validation: list[_Prepared] = []

    def train(self, state: StateFolder, *, overwrite: bool, progress: Progress | None) -> Standing:
        """Train from the state's step to the last, and leave the best weights in the masters."""
        recipe, masters = self._recipe, self.student.masters
        if state.open(masters, overwrite=overwrite):
            standing = state.load(masters, self.optimizer)
            self.student.refresh()
            state.trim_log(standing.step)
        else:
            loss = self.validate(step=0)
            standing = Standing(step=0, start_kl=loss, best_kl=loss, best_step=0)
            state.trim_log(-1)
            state.log({"step": 0, "validation_loss": loss})
            state.save(standing, masters, self.optimizer)
        while standing.step < recipe.num_steps:
            record = self.step(standing.step)
            standing.step += 1
            if standing.step % recipe.validate_every == 0 or standing.step == recipe.num_steps:
                loss = self.validate(step=standing.step)
                _require_converging(loss, standing, state)
                if loss < standing.best_kl:
                    standing.best_kl, standing.best_step = loss, standing.step
                record["validation_loss"] = loss
                state.save(standing, masters, self.optimizer)
            state.log({"step": standing.step, **record})
            if progress is not None:
                progress(_describe(record, standing), standing.step, recipe.num_steps)
        state.load_best(masters)
        self.student.refresh()
        return standing

    def step(self, step: int) -> dict[str, Any]:
        """Take one optimizer step and return what to log.

        Raises:
            TrainingError: if loss or gradient is not finite.
        """
        began = time.perf_counter()
        batches = self.data.training_batches(step)
        num_rows = sum(int(batch.loss_mask.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            prepared = self._prepare(batch)
            loss = self._loss(prepared) * (len(prepared.targets) / num_rows)
            loss.backward()
            self.student.collect_gradients()
            total += float(loss.detach())
        masters = self.student.masters.values()
        norm = float(torch.nn.utils.clip_grad_norm_(masters, self._recipe.max_grad_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            ids = [item_id for batch in batches for item_id in batch.item_ids]
            raise TrainingError(
                f"step {step + 1}: loss {total}, gradient norm {norm}; items {', '.join(ids)}; "
                "the last validated weights are kept in OUT.train; leave out an item that is "
                "broken, or lower learning_rate"
            )
        rate = self._recipe.learning_rate_at(step)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.refresh()
        return {
            "loss": total,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": sum(int(batch.inputs.padding_mask.sum()) for batch in batches),
            "loss_tokens": num_rows,
            "seconds": round(time.perf_counter() - began, 3),
        }

    @torch.no_grad()
    def validate(self, *, step: int) -> float:
        """Return the mean loss over the tokens of the held-out items.

        Raises:
            TrainingError: if it is not finite.
        """
        if not self._validation:  # the teacher's side never changes: computed once, kept on the CPU
            cpu = torch.device("cpu")
            batches = self.data.validation_batches()
            self._validation = [self._prepare(batch).to(cpu) for batch in batches]
        total, num_rows = 0.0, 0
        for prepared in self._validation:
            loss = float(self._loss(prepared.to(self._device)))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"validation at step {step}: loss {loss}; items "
                    f"{', '.join(prepared.item_ids)}; leave out an item that is broken, or lower "
                    "learning_rate"
                )
            total += loss * len(prepared.targets)
            num_rows += len(prepared.targets)
        return total / num_rows

    @torch.no_grad()
    def _prepare(self, batch: LossBatch) -> _Prepared:
        inputs, teacher = batch.inputs, self.teacher
        input_ids = inputs.input_ids.to(self._device)
        features = None
        if len(inputs.pixel_values):
            features = teacher.encode_images(inputs.pixel_values.to(self._device))
        embeds = teacher.embed(input_ids, features)
        padding_mask = inputs.padding_mask.to(self._device)
        loss_mask = batch.loss_mask.to(self._device)
        hidden, _ = teacher.language_model.hidden_states(embeds, padding_mask=padding_mask)
        targets = input_ids.roll(-1, dims=1)[loss_mask]
        return _Prepared(
            batch.item_ids, embeds, padding_mask, loss_mask, hidden[loss_mask], targets
        )

    def _loss(self, prepared: _Prepared) -> Tensor:
        hidden, _ = self.student.language_model.hidden_states(
            prepared.embeds, padding_mask=prepared.padding_mask
        )
        head = self.teacher.language_model.lm_head.weight
        return chunked_loss(
            self._recipe.loss,
            Rows(hidden[prepared.loss_mask], head),
            teacher=Rows(prepared.teacher_hidden, head),
            targets=prepared.targets,
        )


def _warn_about_rate(recipe: DistillRecipe) -> None:
    if recipe.learning_rate > recipe.safe_learning_rate:
        warnings.warn(
            f"learning_rate {recipe.learning_rate:g} is above {recipe.safe_learning_rate:g}: in "
            "published runs of full-size models 2e-5 cost more accuracy than quantization did and "
            "1e-4 ruined them (arXiv 2601.20088); 2e-6 is the default",
            stacklevel=3,
        )


def _identity(
    run: Path, teacher: Path, recipe: DistillRecipe, items: CalibrationSet, seed: int
) -> dict[str, Any]:
    """Check the run, and return what makes two distillations the same one."""
    manifest = check_run(run, teacher)
    return {
        "recipe": recipe.to_dict(),
        "teacher": _digest(f"{name} {sha}" for name, sha in sorted(manifest.source.items())),
        "run": hashlib.sha256((run / MANIFEST_NAME).read_bytes()).hexdigest(),
        "data": {"set": items.spec, "num_items": len(items.items), "seed": seed},
    }


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _require_converging(loss: float, standing: Standing, state: StateFolder) -> None:
    if loss > _DIVERGED * standing.start_kl:
        raise TrainingError(
            f"step {standing.step}: validation loss {loss:.4g} is over {_DIVERGED} times the "
            f"{standing.start_kl:.4g} before training; the last good weights are kept in "
            f"{state.folder}; lower learning_rate and start again with --overwrite"
        )


def _describe(record: dict[str, Any], standing: Standing) -> str:
    return (
        f"loss {record['loss']:.5f} grad {record['grad_norm']:.3f} "
        f"validation {standing.start_kl:.5f} -> {standing.best_kl:.5f}"
    )
