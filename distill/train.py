"""Quantization-aware distillation, from a PTQ run to a better checkpoint of the same format.

    check run -> student, teacher, data -> steps, validating now and then -> best weights -> OUT

The steps themselves are in ``trainer.py``.

The outcome is chosen by the validation loss on held-out items, among the weights of every
validation and those the run started with: where training helps nothing, the run comes out as it
went in.

Several processes share the items of each step. Either each holds the whole training state, or
(``shard``) a slice of it. The main process alone writes.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.execution import Execution
from nvvl.distill.logits import StoredLogits, logits_identity, require_logits_suffice
from nvvl.distill.recipe import DistillRecipe, warn_about_rate
from nvvl.distill.state import StateFolder
from nvvl.distill.teacher import check_run, run_identity
from nvvl.distill.tensorboard import prepare_events_folder
from nvvl.distill.train_folder import LOG_NAME, hold_train_folder, train_folder
from nvvl.distill.trainer import Trainer
from nvvl.distill.write import bf16_folder, staged_outputs, write_bf16, write_quantized
from nvvl.errors import RecipeError, ReportedError, writing
from nvvl.model.processes import Processes
from nvvl.quantize.identity import describe_arithmetic
from nvvl.quantize.manifest import Manifest


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
    execution: Execution | None = None,
) -> DistillResult | None:
    """Train a run's weights towards their BF16 teacher, and write them in the run's format.

    A run that was interrupted goes on from ``OUT.train`` when called again with the same settings.

    Args:
        run: What ``nvvl quantize`` wrote.
        teacher: The BF16 checkpoint it was made from.
        out: The folder to make; the trained BF16 weights go to ``OUT.bf16`` beside it.
        recipe: Settings of the training.
        items: What to train and validate on.
        seed: Of the split and order of items.
        execution: How it is run.

    Returns:
        What came out; None in a process that is not the main one.

    Raises:
        ConfigError: if run and teacher are of different models.
        CheckpointError: if the run is not what its manifest says, or of another teacher.
        DataError: if an item cannot be used, or none is left to train on.
        RecipeError: if the recipe is one for single layers, or a state is to be sliced for one
            process.
        TrainingError: if a loss is not finite, or training diverges.
        HardwareError: if events are asked for, and the package that writes them is missing.
        OutputError: if an output exists, holds another run or what is read, is written by another
            run, or does not fit on the disk.
        ReportedError: on other processes than the main one, in place of any of these.
        KeyboardInterrupt: again, saying how to go on.
    """
    how = execution or Execution()
    out = out.absolute()
    processes = how.processes or Processes(how.device)
    with ExitStack() as held:
        with processes.agreed():
            if recipe.method != "whole":
                raise RecipeError(
                    f'method: required "whole", got "{recipe.method}"; see distill_blockwise'
                )
            if how.shard and processes.count == 1:
                raise RecipeError(
                    "--shard: slices the state over several processes, and there is one; start "
                    "them with torchrun, or leave it out"
                )
            if how.logits is not None:
                require_logits_suffice(recipe)
            if processes.is_main:
                warn_about_rate(recipe)
                prepare_events_folder(how.tensorboard)
                held.enter_context(hold_train_folder(out))
        return _distill_held(run, teacher, out, recipe, items, seed, how, processes)


def _distill_held(
    run: Path,
    teacher: Path,
    out: Path,
    recipe: DistillRecipe,
    items: CalibrationSet,
    seed: int,
    how: Execution,
    processes: Processes,
) -> DistillResult | None:
    """Do what `distill` says, while no other run has ``OUT.train``."""
    with ExitStack() as stack:
        with processes.agreed():
            staged: list[Path] = []
            if processes.is_main:
                sources = [run, teacher, *([how.logits] if how.logits else []), *items.files]
                outputs = staged_outputs(out, sources=sources, overwrite=how.overwrite)
                staged.extend(stack.enter_context(outputs))
                check_run(run, teacher)
            logits = None
            if how.logits is not None:
                logits = StoredLogits(how.logits, logits_identity(teacher, recipe, items))
        data = DistillData.from_set(
            items,
            teacher,
            recipe,
            seed=seed,
            processes=processes,
            check=None if logits is None else logits.check,
            progress=how.progress,
        )
        with processes.agreed():
            data.require_answers()
            identity: dict[str, Any] = {}
            if processes.is_main:
                identity = run_identity(run, teacher, recipe, items, data, seed)
                if logits is not None:
                    identity["logits"] = logits.sha256
        state = StateFolder(train_folder(out), identity | describe_arithmetic(processes.device))
        trainer = Trainer(run, teacher, recipe, data, how, processes, state, logits)
        try:
            standing = trainer.train()
        except KeyboardInterrupt:
            if not processes.is_main:
                raise ReportedError("interrupted") from None
            raise KeyboardInterrupt(
                f"interrupted; the last validated step is kept in {state.folder}, and the same "
                "command goes on from there"
            ) from None
        if not processes.is_main:
            return None
        record = identity | {
            "validation_loss": {"start": standing.start_loss, "written": standing.best_loss},
            "step": standing.best_step,
        }
        quantized, trained = staged
        weights = state.load_best(standing.best_step, trainer.optimizer.weight_shapes())
        with writing(quantized):
            (quantized / f"distill_{LOG_NAME}").write_bytes(state.log_path.read_bytes())
        write_bf16(teacher, trained, weights, distillation=record, command=how.command)
        manifest = write_quantized(
            trained, run, quantized, weights, distillation=record, command=how.command
        )
    state.discard()
    return DistillResult(
        manifest,
        bf16_folder(out),
        standing.start_loss,
        standing.best_loss,
        standing.best_step,
    )
