"""Which changes of a set are noticed."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nvvl.calib_data.manifest import CalibrationSet, load_calibration_set
from nvvl.distill.set_digest import digest_set

HELD_OUT = [2, 5]


def digest(spec: Path) -> str:
    return digest_set(load_calibration_set(spec, num_items=9), HELD_OUT)


@pytest.fixture
def folder(item_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(item_folder, tmp_path / "items"))


def edit_list(folder: Path) -> None:
    path = folder / "items.jsonl"
    path.write_text(path.read_text().replace("answer 3", "answer 4"))


def edit_held_out_picture(folder: Path) -> None:
    path = folder / "5.png"
    size = path.stat().st_size
    Image.new("RGB", (32, 32), (126, 0, 0)).save(path)  # one level brighter, as many bytes
    assert path.stat().st_size == size


def edit_other_picture(folder: Path) -> None:
    Image.effect_noise((32, 32), 50).convert("RGB").save(folder / "3.png")


@pytest.mark.parametrize("edit", [edit_list, edit_held_out_picture, edit_other_picture])
def test_changed_folder_has_another_digest(edit: Callable[[Path], None], folder: Path) -> None:
    before = digest(folder)
    assert digest(folder) == before
    edit(folder)
    assert digest(folder) != before


@pytest.mark.parametrize("name", [b"page.png", b"menu\xe9.png", "menu\u00e9.png".encode()])
def test_names_of_files_are_hashed_as_the_bytes_they_are(name: bytes, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"123")
    items = CalibrationSet(items=(), spec=str(tmp_path), num_requested=1)
    assert digest_set(items, []) == hashlib.sha256(name + b" 3\n").hexdigest()


def test_held_out_item_may_have_a_name_that_is_no_utf8(items: CalibrationSet) -> None:
    item = dataclasses.replace(items.items[1], item_id=os.fsdecode(b"menu\xe9.png"))
    named = dataclasses.replace(items, items=(item,))
    assert digest_set(named, [0]) != digest_set(items, [1])


def test_changed_jsonl_file_has_another_digest(folder: Path) -> None:
    before = digest(folder / "items.jsonl")
    assert digest(folder / "items.jsonl") == before
    edit_list(folder)
    assert digest(folder / "items.jsonl") != before


def test_built_set_is_told_by_its_manifest(folder: Path) -> None:
    built = CalibrationSet(items=(), spec=str(folder), num_requested=9)
    for name in ("manifest.json", "items.parquet"):
        (folder / name).write_text("1")
    before = digest_set(built, [])
    edit_other_picture(folder)
    assert digest_set(built, []) == before
    (folder / "manifest.json").write_text("2")
    assert digest_set(built, []) != before


def test_generated_items_are_told_by_their_content(items: CalibrationSet) -> None:
    default = dataclasses.replace(items, spec="default")
    reordered = dataclasses.replace(default, items=items.items[::-1])
    assert digest_set(default, HELD_OUT) != digest_set(reordered, HELD_OUT)
