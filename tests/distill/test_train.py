"""Whole distillations of the tiny model: recovery, proof, resume, and how they stop."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill import prepare
from nvvl.distill import state as state_module
from nvvl.distill.losses import chunked_loss
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import StateFolder
from nvvl.distill.train import DistillResult, Execution, Trainer, distill
from nvvl.errors import OutputError, RecipeError, TrainingError
from nvvl.export.verify import verify
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.processes import Processes
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint

NVVL = Execution(command=["nvvl"])


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, without times."""
    lines = (folder / "distill_log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0, "tokens_per_second": 0} for line in lines]


@pytest.fixture(scope="module")
def finished(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, DistillResult]:
    out = tmp_path_factory.mktemp("distilled") / "out"
    result = distill(run, tiny_checkpoint, out, recipe, items, execution=NVVL)
    assert result is not None
    return out, result


def test_validation_loss_falls_and_the_best_is_written(
    finished: tuple[Path, DistillResult],
) -> None:
    out, result = finished
    log = read_log(out)
    losses = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    assert list(losses) == [0, 5, 10, 15, 20]
    assert [line["step"] for line in log] == list(range(21))
    assert result.start_loss == losses[0]
    assert result.best_loss == min(losses.values()) == losses[result.best_step]
    assert result.best_loss < 0.9 * result.start_loss


def test_what_is_written_is_proved_against_the_trained_weights(
    finished: tuple[Path, DistillResult],
) -> None:
    out, result = finished
    report = verify(out, result.bf16, logits=False)
    faults = [check for check in report.failed_checks if not check.rule.startswith(("C", "E"))]
    # rules about server configs (C, E) concern keys that the tiny config does not have
    assert faults == []
    assert {check.rule for check in report.checks if check.passed} >= {"H1", "H2", "H3"}


def test_only_linears_and_norms_differ_from_the_teacher(
    finished: tuple[Path, DistillResult], tiny_checkpoint: Path
) -> None:
    teacher, trained = Checkpoint(tiny_checkpoint), Checkpoint(finished[1].bf16)
    assert teacher.tensors.keys() == trained.tensors.keys()
    changed = {n for n in teacher.tensors if teacher.sha256(n) != trained.sha256(n)}
    assert "language_model.backbone.layers.0.mixer.in_proj.weight" in changed
    assert all(
        name.startswith("language_model.backbone.layers.") or name.endswith("norm_f.weight")
        for name in changed
    )
    assert not any(name.endswith(("A_log", "D", "dt_bias", "conv1d.weight")) for name in changed)


def test_manifest_says_where_the_weights_come_from(
    finished: tuple[Path, DistillResult], recipe: DistillRecipe
) -> None:
    record = Manifest.read(finished[0]).distillation
    assert record["recipe"] == recipe.to_dict()
    data = record["data"]
    assert (data["set"], data["num_items"], data["seed"]) == ("test", 14, 0)
    assert len(record["teacher"]) == len(record["run"]) == len(data["sha256"]) == 64
    assert record["step"] == finished[1].best_step


def test_killed_run_goes_on_to_the_same_bits(
    finished: tuple[Path, DistillResult],
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    def kill(_stage: str, done: int, _total: int) -> None:
        if done == 12:  # two steps after the state that is gone on from
            raise Killed

    out = tmp_path / "out"
    execution = dataclasses.replace(NVVL, progress=kill)
    with pytest.raises(Killed):
        distill(run, tiny_checkpoint, out, recipe, items, execution=execution)
    assert not out.exists()
    steps: list[int] = []
    execution = dataclasses.replace(NVVL, progress=lambda _stage, done, _all: steps.append(done))
    distill(run, tiny_checkpoint, out, recipe, items, execution=execution)
    assert steps == list(range(11, 21))
    for name in ("model.safetensors", "calibration.safetensors"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    assert read_log(out) == read_log(finished[0])
    assert not out.with_name("out.train").exists()


def test_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = dataclasses.replace(recipe, validate_every=2)
    calls = 0

    def spoiled(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        loss = chunked_loss(*args, **kwargs)  # type: ignore[arg-type]
        calls += loss.requires_grad
        return loss * float("nan") if calls > 6 else loss

    monkeypatch.setattr(prepare, "chunked_loss", spoiled)
    with pytest.raises(TrainingError, match=r"^step [345]: loss nan.*items item \d+, item \d+"):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    state = json.loads((tmp_path / "out.train" / "state.json").read_text())
    assert state["standing"]["step"] in (2, 4)
    assert not (tmp_path / "out").exists()


def test_diverging_run_stops(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    recipe = dataclasses.replace(recipe, learning_rate=0.9, num_steps=5)
    with pytest.raises(TrainingError, match=r"step 5: .*(over 10 times|not finite|loss)"):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    state = json.loads((tmp_path / "out.train" / "state.json").read_text())
    assert state["standing"]["step"] == 0


def test_rate_above_the_safe_one_warns_with_the_reason(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    finished: tuple[Path, DistillResult],
) -> None:
    recipe = dataclasses.replace(recipe, safe_learning_rate=1e-5)
    with (
        pytest.warns(UserWarning, match=r"learning_rate 0\.001 is above 1e-05: .*2601\.20088"),
        pytest.raises(OutputError, match="exists already"),
    ):
        distill(run, tiny_checkpoint, finished[0], recipe, items)


def test_weights_are_rounded_once_a_step(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    state = StateFolder(tmp_path / "out.train", {})
    trainer = Trainer(run, tiny_checkpoint, recipe, items, 0, NVVL, Processes("cpu"), state, None)
    before = trainer.student.num_refreshes
    assert len(trainer.data.training_batches(0)) > 1
    trainer.step(0)
    assert trainer.student.num_refreshes == before + 1


def test_validation_keeps_no_outputs_of_layers(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    state = StateFolder(tmp_path / "out.train", {})
    losses = []
    for weight in (0.0, 1.0):
        chosen = dataclasses.replace(recipe, layer_loss=weight)
        trainer = Trainer(
            run, tiny_checkpoint, chosen, items, 0, NVVL, Processes("cpu"), state, None
        )
        losses.append(trainer.validate(step=0))
        assert all(prepared.layers == () for prepared in trainer._validation)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "change", [{"recalibrate_inputs": True}, {"trainable": ("norms", "input_scales")}]
)
def test_recipe_about_inputs_needs_quantized_ones(
    change: dict[str, Any],
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    weights_alone = tmp_path / "w4a16"
    quantize_checkpoint(tiny_checkpoint, weights_alone, PRESETS["nvfp4-w4a16"](), None)
    recipe = dataclasses.replace(recipe, **change)
    with pytest.raises(RecipeError, match=f"{next(iter(change))}: scales of inputs need quantized"):
        distill(weights_alone, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert [path.name for path in tmp_path.iterdir()] == ["w4a16"]


def test_events_and_log_have_every_step(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=3, validate_every=2)
    events = tmp_path / "events"
    execution = Execution(tensorboard=events)
    distill(run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=execution)
    log = read_log(tmp_path / "out")
    assert set(log[1]) >= {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}
    (path,) = events.glob("events.out.tfevents.*")
    content = path.read_bytes()
    assert content.count(b"distill/grad_norm") == 3
    assert content.count(b"distill/validation_loss") == 2  # at 2 and at the last


def test_best_weights_are_kept_and_the_best_of_them_written(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=4, validate_every=1, keep_best=3)
    result = distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert result is not None
    log = read_log(tmp_path / "out")
    losses = {line["step"]: line["validation_loss"] for line in log}
    best = sorted(losses, key=lambda step: losses[step])[:3]
    kept = sorted(path.name for path in (tmp_path / "out.train").glob("*.safetensors"))
    assert kept == [f"best-{step:06}.safetensors" for step in sorted(best)]
    assert result.best_step == best[0]


def test_full_disk_while_saving_keeps_the_state_before(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=4, validate_every=2)
    write = write_safetensors

    def fail_later(path: Path, tensors: Any) -> None:
        if path.name == "step-000004.safetensors":
            raise OutputError(f"{path}: the disk is full")
        write(path, tensors)

    monkeypatch.setattr(state_module, "write_safetensors", fail_later)
    with pytest.raises(OutputError, match="the disk is full"):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    monkeypatch.setattr(state_module, "write_safetensors", write)
    steps: list[int] = []
    execution = Execution(progress=lambda _stage, done, _all: steps.append(done))
    assert distill(run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=execution)
    assert steps == [3, 4]
