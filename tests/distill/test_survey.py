"""What is noticed of a set before anything is trained: faulty items, and every change."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet, LazyItems, load_calibration_set
from nvvl.calib_data.sources import failing_source
from nvvl.distill.data import DistillData
from nvvl.distill.precompute import precompute_logits
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.survey import survey_set
from nvvl.distill.train import distill
from nvvl.errors import DataError, OutputError
from nvvl.model.prompt import Message


def digest(spec: Path) -> str | None:
    return survey_set(load_calibration_set(spec, num_items=9), lambda _: None).sha256


@pytest.fixture
def folder(item_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(item_folder, tmp_path / "items"))


def edit_list(folder: Path) -> None:
    path = folder / "items.jsonl"
    path.write_text(path.read_text().replace("answer 3", "answer 4"))


def edit_picture(folder: Path) -> None:
    path = folder / "5.png"
    size = path.stat().st_size
    Image.new("RGB", (32, 32), (126, 0, 0)).save(path)  # one level brighter, as many bytes
    assert path.stat().st_size == size


@pytest.mark.parametrize("edit", [edit_list, edit_picture])
@pytest.mark.parametrize("spec", [".", "items.jsonl"])
def test_changed_set_has_another_digest(
    edit: Callable[[Path], None], spec: str, folder: Path
) -> None:
    before = digest(folder / spec)
    assert digest(folder / spec) == before
    edit(folder)
    assert digest(folder / spec) != before


def test_item_may_have_a_name_that_is_no_utf8(items: CalibrationSet) -> None:
    named = dataclasses.replace(items.items[1], item_id=os.fsdecode(b"menu\xe9.png"))
    sets = [dataclasses.replace(items, items=(item,)) for item in (named, items.items[1])]
    one, other = (survey_set(of, lambda _: None).sha256 for of in sets)
    assert one != other


def from_set(items: CalibrationSet, model: Path, recipe: DistillRecipe) -> DistillData:
    return DistillData.from_set(items, model, recipe, seed=0)


def test_generated_items_are_told_by_those_held_out(
    items: CalibrationSet, tiny_checkpoint: Path, recipe: DistillRecipe
) -> None:
    default = dataclasses.replace(items, spec="default")
    reordered = dataclasses.replace(default, items=items.items[::-1])
    one, other = (from_set(of, tiny_checkpoint, recipe).sha256 for of in (default, reordered))
    assert one != other


def say(item_id: str, *contents: str) -> Item:
    turns = tuple(
        Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)
    )
    return Item(item_id=item_id, messages=turns)


def test_faulty_items_are_named_together_before_anything_is_trained(
    items: CalibrationSet, tiny_checkpoint: Path, recipe: DistillRecipe
) -> None:
    faulty = [say(f"odd {i}", "the <SPECIAL_12>", "thing") for i in range(6)]
    spoilt = dataclasses.replace(items, items=(*items.items, *faulty, say("mute", "the")))
    with pytest.raises(DataError) as caught:
        from_set(spoilt, tiny_checkpoint, dataclasses.replace(recipe, loss_tokens="answers"))
    lines = str(caught.value).split("\n")
    assert lines[0] == "test: 7 of 21 items cannot be used:"
    assert [line.split(":")[0] for line in lines[1:6]] == [f"item odd {i}" for i in range(5)]
    assert lines[6] == "and 2 more"
    alone = dataclasses.replace(items, items=(*items.items, faulty[0]))
    with pytest.raises(DataError, match=r"^item odd 0: "):
        from_set(alone, tiny_checkpoint, recipe)


def test_unreadable_items_are_met_before_the_teacher_runs(
    tiny_checkpoint: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    sources = [failing_source(str(i), DataError(f"{i} is gone")) for i in range(14)]
    broken = CalibrationSet(LazyItems(sources), "folder", 14)
    with pytest.raises(DataError, match="14 of 14 items cannot be used"):
        precompute_logits(tiny_checkpoint, broken, recipe, tmp_path / "logits")


def test_pictures_without_answers_are_refused(
    run: Path, tiny_checkpoint: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(9):
        Image.new("RGB", (32, 32), (25 * index, 0, 0)).save(pictures / f"{index}.png")
    items = load_calibration_set(pictures, num_items=9)
    with pytest.raises(DataError, match="required items with an answer, got pictures"):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert not (tmp_path / "out").exists()


def test_set_is_not_replaced_by_what_is_made_of_it(
    tiny_checkpoint: Path, recipe: DistillRecipe, folder: Path
) -> None:
    (folder / "manifest.json").write_text(json.dumps({"nvvl_version": "an output before"}))
    items = load_calibration_set(folder / "items.jsonl", num_items=9)
    with pytest.raises(OutputError, match=r"holds .*items\.jsonl, which is read"):
        precompute_logits(tiny_checkpoint, items, recipe, folder, overwrite=True)
    assert (folder / "5.png").exists()
