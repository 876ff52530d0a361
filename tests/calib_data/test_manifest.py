from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from nvvl.calib_data.items import item_hash
from nvvl.calib_data.manifest import CalibrationSet, load_calibration_set
from nvvl.errors import DataError

ASK = '{"messages": [{"role": "user", "content": "hi"}]}'


def save_images(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"{index:02d}.png")
    return folder


def ids(calibration_set: CalibrationSet) -> list[str]:
    return [item.item_id for item in calibration_set.items]


def test_default_set_mixes_documents_and_text() -> None:
    calibration_set = load_calibration_set(num_items=16)
    domains = Counter(item.domain for item in calibration_set.items)
    assert {"card", "line", "table", "text", "page", "two_pages", "video", "chart"} <= set(domains)
    assert domains["passage"] == 1
    assert domains["card"] == max(domains.values())
    assert len(set(ids(calibration_set))) == 16


def test_default_set_is_the_same_each_time_and_a_small_one_begins_a_large_one() -> None:
    small, large = (load_calibration_set("default", num_items=n, seed=7) for n in (5, 9))
    assert small.manifest == large.manifest[:5]
    assert load_calibration_set(None, num_items=5, seed=7).manifest == small.manifest
    other = {row["sha256"] for row in load_calibration_set(num_items=5, seed=8).manifest}
    assert not other & {row["sha256"] for row in small.manifest}


def test_manifest_has_the_hash_of_each_item() -> None:
    calibration_set = load_calibration_set(num_items=3)
    assert calibration_set.manifest == [
        {"id": item.item_id, "sha256": item_hash(item)} for item in calibration_set.items
    ]
    assert len(calibration_set.manifest) == 3


def test_items_can_be_indexed_and_sliced() -> None:
    items = load_calibration_set(num_items=4).items
    assert [item.item_id for item in items[1:3]] == [items[1].item_id, items[2].item_id]
    assert items[-1].item_id == items[3].item_id
    with pytest.raises(IndexError):
        items[4]


def test_long_default_set_takes_no_memory_until_it_is_read() -> None:
    items = load_calibration_set(num_items=2**32, seed=1).items
    assert (len(items), items[-1].item_id) == (2**32, f"card-train-1-{2**32 - 1}")
    assert [item.item_id for item in items[2:4]] == ["line-train-1-2", "table-train-1-3"]
    with pytest.raises(DataError, match=r"default: required at most 4294967296 items, got 10000"):
        load_calibration_set(num_items=10**20)


def test_own_images_are_sampled_by_seed(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 20)
    first, again, other = (
        ids(load_calibration_set(folder, num_items=6, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again == sorted(first)
    assert len(set(first)) == 6
    assert first != other


def test_fewer_images_than_asked_are_all_used_and_the_request_is_kept(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 3)
    calibration_set = load_calibration_set(str(folder), num_items=1024)
    assert ids(calibration_set) == ["00.png", "01.png", "02.png"]
    assert calibration_set.num_requested == 1024
    assert calibration_set.spec == str(folder)


def test_jsonl_in_the_folder_says_what_to_ask(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "images", 2)
    (folder / "ask.jsonl").write_text(ASK)
    assert ids(load_calibration_set(folder, num_items=9)) == ["ask:1"]
    assert ids(load_calibration_set(folder / "ask.jsonl", num_items=9)) == ["ask:1"]
    (folder / "more.jsonl").write_text(ASK)
    with pytest.raises(DataError, match=r"several JSONL files \(ask.jsonl, more.jsonl\)"):
        load_calibration_set(folder, num_items=9)


def test_what_cannot_be_a_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv: required a built set, a folder of"):
        load_calibration_set(tmp_path / "a.csv", num_items=1)
    with pytest.raises(DataError, match="absent: no such file or folder; required 'default'"):
        load_calibration_set(tmp_path / "absent", num_items=1)
    with pytest.raises(DataError, match="found none"):
        load_calibration_set(tmp_path, num_items=1)
    with pytest.raises(DataError, match="required at least one item, got 0"):
        load_calibration_set(num_items=0)
