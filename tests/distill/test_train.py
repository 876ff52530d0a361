"""Whole distillations of the tiny model: recovery, proof, resume, and how they stop."""

import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill import prepare
from nvvl.distill import state as state_module
from nvvl.distill.data import DistillData
from nvvl.distill.execution import Execution
from nvvl.distill.losses import chunked_loss
from nvvl.distill.optimize import Optimizer
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import StateFolder
from nvvl.distill.student import Student
from nvvl.distill.survey import STAGE
from nvvl.distill.train import DistillResult, distill
from nvvl.distill.trainer import Trainer
from nvvl.errors import (
    CheckpointError,
    HardwareError,
    OutputError,
    RecipeError,
    ReportedError,
    TrainingError,
)
from nvvl.export.verify import verify
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.hashing import hash_file
from nvvl.model.processes import Processes
from nvvl.model.processor import Processor
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint

NVVL = Execution(command=["nvvl"])


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


def add_step_to(steps: list[int]) -> Callable[[str, int, int], None]:
    """Return a callback that adds the number of each step."""

    def add(stage: str, done: int, _total: int) -> None:
        if stage != STAGE:
            steps.append(done)

    return add


def kill_at_first_step(stage: str, *_: object) -> None:
    if stage != STAGE:
        raise Killed


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
    failed = [check.rule for check in report.checks if check.passed is False]
    # rules about server configs (C, E) concern keys that the tiny config does not have
    assert [rule for rule in failed if not rule.startswith(("C", "E"))] == []
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
    def kill(stage: str, done: int, _total: int) -> None:
        if stage != STAGE and done == 12:  # two steps after the state that is gone on from
            raise Killed

    out = tmp_path / "out"
    execution = dataclasses.replace(NVVL, progress=kill)
    with pytest.raises(Killed):
        distill(run, tiny_checkpoint, out, recipe, items, execution=execution)
    assert not out.exists()
    steps: list[int] = []
    execution = dataclasses.replace(NVVL, progress=add_step_to(steps))
    distill(run, tiny_checkpoint, out, recipe, items, execution=execution)
    assert steps == list(range(11, 21))
    for name in ("model.safetensors", "calibration.amax"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    assert read_log(out) == read_log(finished[0])
    assert not out.with_name("out.train").exists()


@pytest.mark.parametrize("change", ["none", "one bit"])
def test_main_process_alone_hashes_the_state_that_all_go_on_from(
    change: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    in_two_processes: Callable[[Callable[[Processes], Any]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = dataclasses.replace(recipe, num_steps=2)
    out = tmp_path / "out"
    killed = Execution(progress=kill_at_first_step)
    with pytest.raises(Killed):
        distill(run, tiny_checkpoint, out, short, items, execution=killed)
    path = tmp_path / "out.train" / "step-000000.safetensors"
    if change == "one bit":
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    main: list[int] = []
    hashed: list[tuple[str, bool]] = []

    def count(file: Path) -> str:
        hashed.append((file.name, threading.get_ident() in main))
        return hash_file(file)

    def go_on(processes: Processes) -> DistillResult | None:
        if processes.is_main:
            main.append(threading.get_ident())
        execution = Execution(processes=processes)
        return distill(run, tiny_checkpoint, out, short, items, execution=execution)

    monkeypatch.setattr("nvvl.model.hashing.hash_file", count)
    said = in_two_processes(go_on)
    assert [is_main for name, is_main in hashed if name == path.name] == [True]
    if change == "one bit":
        assert [type(error) for error in said] == [CheckpointError, ReportedError]
        assert "missing or changed since it was saved" in str(said[0])
    else:
        assert isinstance(said[0], DistillResult)
        assert said[1] is None


def test_weights_are_taken_where_they_are_the_best_alone(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {0: 0.5, 1: 0.6, 2: 0.4, 3: 0.4}
    monkeypatch.setattr(Trainer, "validate", lambda _, *, step: losses[step])
    weights = Optimizer.weights
    taken: list[int] = []

    def take(optimizer: Optimizer) -> dict[str, torch.Tensor]:
        taken.append(optimizer.num_steps)
        return weights(optimizer)

    monkeypatch.setattr(Optimizer, "weights", take)
    recipe = dataclasses.replace(recipe, num_steps=3, validate_every=1)
    result = distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert taken == [0, 2]
    assert result is not None
    assert (result.start_loss, result.best_loss, result.best_step) == (0.5, 0.4, 2)


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
    recipe = dataclasses.replace(recipe, learning_rate=0.9)
    with pytest.raises(TrainingError, match=r"step 5: validation loss .* is over 10 times the "):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    state = json.loads((tmp_path / "out.train" / "state.json").read_text())
    assert state["standing"]["step"] == 0


def test_run_stops_where_the_validation_loss_has_grown_tenfold(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {0: 0.5, 1: 5.0, 2: 5.01}
    monkeypatch.setattr(Trainer, "validate", lambda _, *, step: losses[step])
    recipe = dataclasses.replace(recipe, num_steps=3, validate_every=1)
    message = r"^step 2: validation loss 5\.01 is over 10 times the 0\.5 before training"
    with pytest.raises(TrainingError, match=message):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)


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
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = StateFolder(tmp_path / "out.train", {})
    data = DistillData(items.items, Processor.from_folder(tiny_checkpoint), recipe, seed=0)
    trainer = Trainer(run, tiny_checkpoint, recipe, data, NVVL, Processes("cpu"), state, None)
    assert len(data.training_batches(0)) > 1
    rounded: list[Student] = []
    refresh = Student.refresh

    def count(student: Student) -> None:
        rounded.append(student)
        refresh(student)

    monkeypatch.setattr(Student, "refresh", count)
    trainer.step(0)
    assert rounded == [trainer.student]


def test_validation_keeps_no_outputs_of_layers(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    state = StateFolder(tmp_path / "out.train", {})
    data = DistillData(items.items, Processor.from_folder(tiny_checkpoint), recipe, seed=0)
    losses = []
    for weight in (0.0, 1.0):
        chosen = dataclasses.replace(recipe, layer_loss=weight)
        trainer = Trainer(run, tiny_checkpoint, chosen, data, NVVL, Processes("cpu"), state, None)
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


def test_events_that_cannot_be_written_are_refused_before_anything_is_read(
    items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere"
    (tmp_path / "file").touch()

    def start(events: Path) -> None:
        execution = Execution(tensorboard=events)
        distill(nowhere, nowhere, tmp_path / "out", recipe, items, execution=execution)

    with pytest.raises(OutputError, match=r"file/events: cannot be written \(Not a directory\)"):
        start(tmp_path / "file" / "events")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(HardwareError, match="needs the package tensorboardX"):
        start(tmp_path / "events")


def test_finished_run_leaves_nothing_and_is_begun_anew_by_the_same_command(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=1)
    steps: list[int] = []
    execution = Execution(progress=add_step_to(steps))
    for _ in range(2):
        assert distill(run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=execution)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.bf16"]
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
    assert steps == [1, 1]


def test_output_that_another_run_trains_is_refused_and_left_alone(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=1)
    other = dataclasses.replace(recipe, learning_rate=2e-3)
    out = tmp_path / "out"
    overwrite = Execution(overwrite=True)

    def start_another(_stage: str, _done: int, _all: int) -> None:
        with pytest.raises(OutputError, match=r"out\.train: another run is writing there"):
            distill(run, tiny_checkpoint, out, other, items, execution=overwrite)

    execution = Execution(progress=start_another)
    result = distill(run, tiny_checkpoint, out, recipe, items, execution=execution)
    assert result is not None
    assert result.manifest.distillation["recipe"] == recipe.to_dict()


@pytest.mark.parametrize("name", ["out", "out.bf16"])
@pytest.mark.parametrize("read", ["run", "teacher", "logits"])
def test_what_is_read_is_never_replaced(
    name: str,
    read: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    given = {"run": run, "teacher": tiny_checkpoint, "logits": tmp_path / "logits"}
    given[read] = folder
    execution = Execution(logits=given["logits"], overwrite=True)
    with pytest.raises(OutputError, match=f"{name}: holds {folder}, which is read"):
        distill(
            given["run"], given["teacher"], tmp_path / "out", recipe, items, execution=execution
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("change", ["other", "unknown"])
def test_run_of_another_processor_is_not_gone_on_with(
    change: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, path = tmp_path / "out", tmp_path / "out.train" / "state.json"
    killed = Execution(progress=kill_at_first_step)
    with pytest.raises(Killed):
        distill(run, tiny_checkpoint, out, recipe, items, execution=killed)
    state = json.loads(path.read_text())
    if change == "other":
        arithmetic = {"processor": "PDP-11"}
        monkeypatch.setattr("nvvl.distill.train.describe_arithmetic", lambda _: arithmetic)
    else:  # as states were before they named it
        del state["identity"]["processor"]
        path.write_text(json.dumps(state))
    with pytest.raises(
        OutputError, match=r"out\.train: holds a run with other settings: .*processor"
    ):
        distill(run, tiny_checkpoint, out, recipe, items)


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
    execution = Execution(progress=add_step_to(steps))
    assert distill(run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=execution)
    assert steps == [3, 4]
