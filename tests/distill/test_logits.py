"""Logits computed before: what is kept, what they are refused for, and training against them."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.execution import Execution
from nvvl.distill.logits import LogitsWriter, StoredLogits, logits_identity
from nvvl.distill.precompute import precompute_logits
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.train import distill
from nvvl.errors import CheckpointError, DataError, OutputError, RecipeError
from nvvl.model.load import load_model
from nvvl.model.processor import Processor

VOCABULARY = 304


@pytest.fixture(scope="module")
def logits(
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Every token of every position, so that the KL is the whole one."""
    out = tmp_path_factory.mktemp("logits") / "logits"
    precompute_logits(tiny_checkpoint, items, recipe, out, num_tokens=VOCABULARY)
    return out


def open_logits(
    folder: Path, teacher: Path, recipe: DistillRecipe, items: CalibrationSet
) -> StoredLogits:
    return StoredLogits(folder, logits_identity(teacher, recipe, items))


def test_kept_tokens_are_the_teacher_s(
    logits: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    item = items.items[3]  # with an image
    inputs = Processor.from_folder(tiny_checkpoint)(item.messages, images=item.images)
    teacher = load_model(tiny_checkpoint)
    with torch.no_grad():
        output = teacher(inputs.input_ids[None], pixel_values=inputs.pixel_values)
    counted = (inputs.input_ids != teacher.config.image_token_id)[:-1]
    expected = output.logits[0, :-1][counted].float().log_softmax(-1)

    stored = open_logits(logits, tiny_checkpoint, recipe, items)
    kept = stored.read([item.item_id], torch.device("cpu"))
    found = torch.empty_like(expected).scatter(-1, kept.tokens, kept.log_probs)
    # the model gives bfloat16 logits, stored ones are float32 products of its hidden states
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_training_against_stored_logits_is_training_against_the_teacher(
    logits: Path,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    recipe = dataclasses.replace(recipe, num_steps=3, validate_every=3)
    live = distill(run, tiny_checkpoint, tmp_path / "live", recipe, items)
    execution = Execution(logits=logits)
    stored = distill(run, tiny_checkpoint, tmp_path / "kept", recipe, items, execution=execution)
    assert live is not None
    assert stored is not None
    # log-probabilities are rounded to float32 on the way to the disk
    assert stored.start_loss == pytest.approx(live.start_loss, rel=1e-5)
    assert stored.best_loss == pytest.approx(live.best_loss, rel=1e-3)
    assert "logits" in stored.manifest.distillation


def test_other_settings_are_refused(
    logits: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    answers = dataclasses.replace(recipe, loss_tokens="answers")
    with pytest.raises(CheckpointError, match=r"made otherwise: loss_tokens: .* then, .* now"):
        open_logits(logits, tiny_checkpoint, answers, items)
    other = dataclasses.replace(items, spec="other")
    with pytest.raises(CheckpointError, match=r"made otherwise: set: .* then, .* now"):
        open_logits(logits, tiny_checkpoint, recipe, other)


def test_changed_or_unknown_item_is_named(
    logits: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    stored = open_logits(logits, tiny_checkpoint, recipe, items)
    first, second = items.items[:2]
    stored.check(first)
    with pytest.raises(DataError, match="item item 1: has another content"):
        stored.check(dataclasses.replace(first, item_id=second.item_id))
    with pytest.raises(DataError, match="item stranger: has no entry"):
        stored.check(dataclasses.replace(first, item_id="stranger"))


def test_flipped_bit_is_found(
    logits: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    path = logits / "logits-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"logits-00000\.safetensors: missing or changed"):
            open_logits(logits, tiny_checkpoint, recipe, items)
    finally:
        path.write_bytes(whole)


def test_disk_that_fills_up_at_the_manifest_is_one_line(
    items: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogitsWriter(tmp_path, {}, num_tokens=2)
    writer.add(items.items[0], torch.ones(3, 4), torch.eye(4))

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"manifest\.json: cannot be written \(No space left"):
        writer.finish()


def test_folder_of_something_else_is_refused(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    with pytest.raises(CheckpointError, match=r"not a folder of teacher logits \(without iden"):
        open_logits(run, tiny_checkpoint, recipe, items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mse"}, 'stored logits serve "kl" alone'),
        ({"layer_loss": 1.0}, "layer_loss"),
        (
            {"method": "layers", "validate_every": 50},  # its default
            'stored logits serve "whole" alone, got "layers"',
        ),
    ],
)
def test_recipe_that_needs_the_teacher_is_refused(
    change: dict[str, object],
    message: str,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    recipe = DistillRecipe.from_dict(recipe.to_dict() | change)
    with pytest.raises(RecipeError, match=message):
        precompute_logits(tiny_checkpoint, items, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_there_are_are_refused(
    tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"--top {VOCABULARY + 1}: .* knows {VOCABULARY} tok"):
        precompute_logits(
            tiny_checkpoint, items, recipe, tmp_path / "out", num_tokens=VOCABULARY + 1
        )
    assert not list(tmp_path.glob("out*"))


def test_manifest_names_files_and_items_by_hash(logits: Path, items: CalibrationSet) -> None:
    manifest = json.loads((logits / "manifest.json").read_text())
    assert list(manifest["files"]) == ["logits-00000.safetensors"]
    assert manifest["items"].keys() == {item.item_id for item in items.items}
    assert {entry["id"]: entry["sha256"] for entry in items.manifest} == {
        item_id: entry["sha256"] for item_id, entry in manifest["items"].items()
    }
