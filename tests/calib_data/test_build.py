import errno
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from nvvl.calib_data.built import SHEET, TABLE, read_manifest, read_rows
from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.kept_prints import KeptPrints
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.calib_data.media import picture_name
from nvvl.calib_data.sources import generated_item
from nvvl.errors import DataError, OutputError
from nvvl.model.prompt import Message

Build = Callable[..., dict[str, Any]]

PAGES = {"kind": "documents", "name": "pages", "count": 4, "kinds": ["line", "passage", "video"]}
ASK = [{"role": "user", "content": "What is it?"}]


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    spots = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(spots).resize(size).save(path)
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_jsonl(path: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_items_read_back_are_those_that_were_generated(build: Build, tmp_path: Path) -> None:
    build(PAGES)
    loaded = load_calibration_set(tmp_path / "out", num_items=99).items
    made = [
        generated_item(kind, index, seed=0, split="train", fonts="train").load()
        for index, kind in enumerate(("line", "passage", "video", "line"))
    ]
    assert [item_hash(item) for item in loaded] == [item_hash(item) for item in made]
    assert [item.item_id for item in loaded] == [f"pages/{item.item_id}" for item in made]
    assert [item.domain for item in loaded] == ["line", "passage", "video", "line"]


def test_two_builds_give_the_same_bytes(build: Build, tmp_path: Path) -> None:
    build(PAGES)
    build(PAGES, out="again")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "again")
    build({**PAGES, "seed": 1}, out="other")
    assert folder_bytes(tmp_path / "out").keys() != folder_bytes(tmp_path / "other").keys()


def test_manifest_says_what_the_set_holds(build: Build, tmp_path: Path) -> None:
    manifest = build(PAGES)
    assert manifest["summary"] == read_manifest(tmp_path / "out")["summary"]
    summary = manifest["summary"]
    assert (summary["num_items"], summary["num_images"], summary["num_videos"]) == (4, 2, 1)
    rows = read_rows(tmp_path / "out")
    for kind in ("text", "image", "video", "answer"):
        total = sum(row[f"{kind}_tokens"] for row in rows)
        assert summary[f"{kind}_tokens"] == total > 0
        by_domain = sum(counts[f"{kind}_tokens"] for counts in summary["domains"].values())
        assert by_domain == total
    assert sum(summary["images_by_tiles"].values()) == 2
    assert len(list((tmp_path / "out" / "media").rglob("*.png"))) == summary["num_pictures"]
    with Image.open(tmp_path / "out" / SHEET) as sheet:
        assert sheet.width > 1000


def test_equal_pictures_are_stored_once(build: Build, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    shutil.copy(image, tmp_path / "b.png")
    write_jsonl(
        tmp_path / "x.jsonl",
        {"images": ["a.png", "b.png"], "messages": ASK},
        {"image": "b.png", "messages": [{"role": "user", "content": "And this?"}]},
    )
    manifest = build({"kind": "jsonl", "path": "x.jsonl"})
    (stored,) = (tmp_path / "out" / "media").rglob("*.png")
    assert stored.stem == picture_name(Image.open(image))
    assert manifest["summary"]["num_images"] == 3
    assert manifest["summary"]["num_pictures"] == 1


def test_an_item_that_is_there_already_is_left_out_and_named(build: Build, tmp_path: Path) -> None:
    shutil.copy(save_image(tmp_path / "images/a.png"), tmp_path / "images/b.png")
    manifest = build({"kind": "folder", "name": "mine", "path": "images"})
    assert manifest["summary"]["num_items"] == 1
    assert manifest["sources"][0]["duplicates"] == ["mine/b.png"]


@pytest.mark.parametrize("out", [".", "images", "sub/.."])
def test_a_set_does_not_replace_what_it_is_made_of(out: str, build: Build, tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    (tmp_path / "sub").mkdir()
    with pytest.raises(OutputError, match=r"holds .*, which is read; choose another OUT"):
        build({"kind": "folder", "name": "mine", "path": "images"}, out=out, overwrite=True)
    assert (tmp_path / "images/a.png").exists()


def test_answers_can_be_left_out(build: Build, tmp_path: Path) -> None:
    kind = {"kind": "documents", "count": 1, "kinds": ["line"]}
    build({**kind, "answers": False}, out="asked")
    build(kind)
    (asked,), (answered,) = (
        load_calibration_set(tmp_path / name, num_items=1).items for name in ("asked", "out")
    )
    assert [message.role for message in answered.messages] == ["user", "assistant"]
    assert asked.messages == answered.messages[:-1]
    assert read_rows(tmp_path / "asked")[0]["answer_tokens"] == 0
    assert read_rows(tmp_path / "out")[0]["answer_tokens"] > 0


def test_long_items_are_named_and_the_next_take_their_place(build: Build, tmp_path: Path) -> None:
    source = {"kind": "documents", "name": "d", "count": 3, "kinds": ["line", "two_pages"]}
    rows = []
    for name, options in (("all", {}), ("out", {"max_tokens": 150})):
        manifest = build(source, out=name, **options)
        rows.append({row["id"]: row for row in read_rows(tmp_path / name)})
    everything, short = rows
    tokens = {
        key: sum(row[f"{kind}_tokens"] for kind in ("text", "image", "video"))
        for key, row in {**everything, **short}.items()
    }
    left_out = manifest["sources"][0]["too_long"]
    assert left_out
    assert all(row["tokens"] > 150 for row in left_out)
    assert {row["id"]: row["tokens"] for row in left_out} | tokens == tokens | {
        row["id"]: row["tokens"] for row in left_out
    }
    assert len(short) == 3
    assert all(tokens[key] <= 150 for key in short)
    for key in everything.keys() & short.keys():
        assert everything[key] == short[key], "an item was cut"


def test_too_few_items_are_refused_with_the_reasons(build: Build, tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png", 1)
    save_image(tmp_path / "images/b.png", 1)
    (tmp_path / "images/c.png").write_bytes(b"no image")
    source = {"kind": "folder", "name": "mine", "path": "images", "count": 3}
    with pytest.raises(DataError, match=r"mine: required 3 items, got 1 \(1 bad, 0 too long, 1 tw"):
        build(source, skip_bad=True)
    with pytest.raises(DataError, match=r"got 0 \(1 bad, 2 too long"):
        build(source, skip_bad=True, max_tokens=3)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_documents_that_are_all_too_long_come_to_an_end(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.calib_data.build._MOST_LEFT_OUT", 5)
    source = {"kind": "documents", "name": "d", "count": 3, "kinds": ["line"]}
    with pytest.raises(DataError, match=r"d: required 3 items, got 0 \(0 bad, 5 too long"):
        build(source, max_tokens=3)


def test_a_bad_item_is_refused_unless_it_may_be_skipped(build: Build, tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes(b"no image")
    source = {"kind": "folder", "name": "mine", "path": "images"}
    with pytest.raises(DataError, match=r"mine: .*b.png: not an image.* --skip-bad leaves"):
        build(source)
    manifest = build(source, skip_bad=True)
    (bad,) = manifest["sources"][0]["bad"]
    assert bad["id"] == "b.png"
    assert "not an image" in bad["reason"]
    assert manifest["summary"]["num_items"] == 1


def test_a_bad_line_is_named_with_its_number(build: Build, tmp_path: Path) -> None:
    good = {"messages": ASK}
    write_jsonl(tmp_path / "x.jsonl", good, "", "{", {**good, "id": "other", "messages": ASK * 2})
    source = {"kind": "jsonl", "name": "mine", "path": "x.jsonl"}
    with pytest.raises(DataError, match=r"mine: .*x.jsonl:3: not valid JSON"):
        build(source)
    (bad,) = build(source, skip_bad=True)["sources"][0]["bad"]
    assert bad["reason"].startswith(f"{tmp_path}/x.jsonl:3: ")


@pytest.mark.parametrize(
    ("name", "image", "size"),
    [
        ("one.png", Image.new("RGB", (1, 1), "red"), (1, 1)),
        ("cmyk.jpg", Image.new("CMYK", (30, 20), (0, 255, 255, 0)), (30, 20)),
        ("deep.png", Image.new("I;16", (30, 20), 40_000), (30, 20)),
        ("palette.gif", Image.new("P", (30, 20), 3), (30, 20)),
    ],
)
def test_unusual_images_become_rgb(
    build: Build, tmp_path: Path, name: str, image: Image.Image, size: tuple[int, int]
) -> None:
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / name.replace(".gif", ".png"))
    build({"kind": "folder", "path": "images"})
    (item,) = load_calibration_set(tmp_path / "out", num_items=1).items
    assert (item.images[0].mode, item.images[0].size) == ("RGB", size)


def test_a_rotated_photograph_is_turned_and_an_animation_gives_its_first_frame(
    build: Build, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 20), "red").save(tmp_path / "images/a.jpg", exif=exif)
    frames = [Image.new("RGB", (24, 24), color) for color in ("lime", "blue")]
    frames[0].save(tmp_path / "images/b.webp", save_all=True, append_images=frames[1:])
    build({"kind": "folder", "path": "images"})
    turned, first = load_calibration_set(tmp_path / "out", num_items=2).items
    assert turned.images[0].size == (20, 40)
    assert first.images[0].getpixel((3, 3)) == pytest.approx((0, 255, 0), abs=3)  # WebP is lossy


def test_a_gigapixel_image_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    # a header that says 50,000 x 40,000, and no pixels behind it: size decides before they are read
    header = struct.pack(">IIBBBBB", 50_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", b"x"))
    ]
    (tmp_path / "images/huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(DataError, match=r"huge.png: .*2000000000 pixels"):
        build({"kind": "folder", "path": "images"})


def test_existing_folders_are_replaced_only_on_request(build: Build, tmp_path: Path) -> None:
    build(PAGES)
    with pytest.raises(OutputError, match="out: exists already; choose another OUT, or pass"):
        build(PAGES)
    build({**PAGES, "count": 1}, overwrite=True)
    assert read_manifest(tmp_path / "out")["summary"]["num_items"] == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("keep")
    for text in ("{}", '{"nvvl_version": "0.1.0"}'):  # of a checkpoint, which is no set
        (tmp_path / "other/manifest.json").write_text(text)
        with pytest.raises(OutputError, match=r"no manifest\.json of an nvvl calibration set"):
            build(PAGES, out="other", overwrite=True)
    assert (tmp_path / "other/mine.txt").read_text() == "keep"


def test_what_a_killed_build_left_is_removed_by_the_next(build: Build, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-killed"
    (left / "output" / "media").mkdir(parents=True)
    os.utime(left, (1e9, 1e9))
    build(PAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_came_to_stand_at_out_meanwhile_is_kept_and_so_is_the_set(
    build: Build, tmp_path: Path
) -> None:
    def interfere() -> list[Item]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
        return []

    with pytest.raises(OutputError, match=r"out: holds files .*; the finished out") as caught:
        build(PAGES, against={"exam": interfere}, overwrite=True)
    assert (tmp_path / "out/thesis.txt").exists()
    (kept,) = tmp_path.glob(".out.*/output")
    assert str(caught.value).endswith(f"kept as {kept}")
    assert len(load_calibration_set(kept, num_items=9).items) == 4


def test_both_sets_are_kept_if_the_new_one_cannot_get_its_name(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build({**PAGES, "count": 1})
    out, rename = tmp_path / "out", Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == out and path.name != "old":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"name \(Device or resource busy\); the finished out"):
        build(PAGES, overwrite=True)
    (kept,) = tmp_path.glob(".out.*/output")
    assert [len(load_calibration_set(f, num_items=9).items) for f in (out, kept)] == [1, 4]


@pytest.mark.parametrize(
    "source",
    [
        *({"kind": kind, "path": "absent"} for kind in ("folder", "jsonl", "pdf", "video", "text")),
        {"kind": "hub", "dataset": "parquet", "data_files": ["absent"], "text": "t", "count": 1},
        {"kind": "shards", "dataset": ".", "subset": "absent", "count": 1},
    ],
    ids=lambda source: str(source["kind"]),
)
def test_a_source_that_is_not_there_is_named_before_anything_is_drawn(
    build: Build, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: object) -> None:
        pytest.fail("drawn before the sources were looked at")

    monkeypatch.setattr("nvvl.calib_data.comparison.ProcessPoolExecutor", draw)
    with pytest.raises(DataError, match=r"last: .*absent"):
        build(PAGES, {**source, "name": "last"}, against={"exam": list}, jobs=2)


def test_names_of_files_that_are_no_utf8_are_escaped(build: Build, tmp_path: Path) -> None:
    good, bad = (os.fsdecode(name) for name in (b"menu\xe9.png", b"na\xefve.png"))
    save_image(tmp_path / "images" / good)
    (tmp_path / "images" / bad).write_bytes(b"no image")
    build({"kind": "folder", "name": "mine", "path": "images"}, skip_bad=True)
    (item,) = load_calibration_set(tmp_path / "out", num_items=9).items
    assert item.item_id == r"mine/menu\udce9.png"
    (left_out,) = read_manifest(tmp_path / "out")["sources"][0]["bad"]
    assert left_out["id"] == bad


def test_damage_is_found_when_the_set_is_used(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build({"kind": "documents", "count": 2, "kinds": ["line"]})
    first, second = sorted((out / "media").rglob("*.png"))
    shutil.copy(first, second)
    with pytest.raises(DataError, match=f"{second.name}: has other pixels"):
        list(load_calibration_set(out, num_items=2).items)
    second.unlink()
    with pytest.raises(DataError, match=f"{second.name}: no such image file"):
        list(load_calibration_set(out, num_items=2).items)
    table = bytearray((out / TABLE).read_bytes())
    table[len(table) // 2] ^= 1
    (out / TABLE).write_bytes(table)
    with pytest.raises(DataError, match=r"items.parquet: is not the table that manifest.json"):
        load_calibration_set(out, num_items=2)
    (out / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match=r"manifest.json: required a nvvl calibration set of vers"):
        load_calibration_set(out, num_items=2)


@pytest.mark.parametrize(
    ("files", "table", "message"),
    [
        ({}, b"", "is not the table that manifest.json names"),
        ([1], b"", "is not the table that manifest.json names"),
        (None, b"junk", r"cannot be read \(.*; build the set again"),
        (None, {}, "row 0: required id, sha256, domain, messages, images, videos as nv"),
        (None, {"messages": ["x"]}, "row 0: required id, sha256, domain, messages, images, vid"),
    ],
)
def test_table_that_is_something_else_is_named(
    files: object, table: Any, message: str, build: Build, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = build({"kind": "documents", "count": 1, "kinds": ["line"]})
    if isinstance(table, bytes):
        (out / TABLE).write_bytes(table)
    else:
        (row,) = read_rows(out)
        del row["messages"]
        Dataset.from_list([row | table]).to_parquet(out / TABLE)
    found = {TABLE: hashlib.sha256((out / TABLE).read_bytes()).hexdigest()}
    values = {**manifest, "files": found if files is None else files}
    (out / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"items\.parquet: {message}"):
        load_calibration_set(out, num_items=1)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{"])
def test_manifest_that_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        read_manifest(tmp_path)


def test_a_spec_is_not_taken_for_a_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"with: nvvl calib build '/.*/my set\.toml' OUT"):
        load_calibration_set(tmp_path / "my set.toml", num_items=1)


def test_overlap_is_refused_or_recorded(build: Build, tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png", 1, (64, 64))
    save_image(tmp_path / "images/b.png", 2, (64, 64))

    def suite() -> list[Item]:
        picture = Image.open(tmp_path / "images/b.png").resize((200, 200))
        return [Item("exam-7", (Message("user", "<image>\nRead."),), (picture,))]

    source = {"kind": "folder", "name": "mine", "path": "images"}
    with pytest.raises(
        DataError,
        match=r"overlaps .*: mine/b.png shares a picture with exam-7 of exam; .* --allow-overlap",
    ):
        build(source, suites={"exam": suite})
    assert not (tmp_path / "out").exists()
    manifest = build(source, suites={"exam": suite}, allow_overlap=True)
    assert manifest["overlap"] == {
        "suites": ["exam"],
        "apart": [],
        "found": [
            {"item_id": "mine/b.png", "suite": "exam", "other_id": "exam-7", "kind": "picture"}
        ],
    }
    assert build(source, out="clean", suites={"none": list})["overlap"]["found"] == []


@pytest.mark.parametrize(
    ("sources", "is_apart"),
    [
        ([PAGES], True),
        ([{**PAGES, "split": "held_out"}], False),
        ([PAGES, {"kind": "folder", "path": "images"}], False),
    ],
)
def test_suites_are_drawn_only_if_a_source_can_overlap_with_them(
    sources: list[dict[str, Any]], is_apart: bool, build: Build, tmp_path: Path
) -> None:
    save_image(tmp_path / "images/a.png")
    drawn: list[str] = []

    def draw(name: str) -> list[Item]:
        drawn.append(name)
        return []

    sets = {name: partial(draw, name) for name in ("exam", "own")}
    stages: list[str] = []
    overlap = build(
        *sources,
        suites={"exam": sets["exam"]},
        against={"own": sets["own"]},
        progress=lambda stage, *_: stages.append(stage),
    )["overlap"]
    assert drawn == overlap["suites"] == (["own"] if is_apart else ["exam", "own"])
    assert overlap["apart"] == (["exam"] if is_apart else [])
    assert [f"comparing with {name}" in stages for name in sets] == [not is_apart, True]


def test_suites_are_drawn_once_and_again_only_if_they_may_overlap(
    build: Build, tmp_path: Path
) -> None:
    drawn: list[str] = []

    def suite(name: str) -> Iterator[Item]:
        drawn.append(name)
        if name == "pictures":
            picture = Image.open(tmp_path / "exam.png")
            yield Item("exam-7", (Message("user", "<image>\nRead."),), (picture,))
        elif name == "texts":
            yield Item("exam-8", (Message("user", "Which words are these?"),))

    for seed, name in enumerate(("exam", "images/a", "other/b")):
        save_image(tmp_path / f"{name}.png", seed, (64, 64))
    write_jsonl(
        tmp_path / "x.jsonl", {"messages": [{"role": "user", "content": "which words, are these"}]}
    )
    names = ("pictures", "texts", "none")
    options: dict[str, Any] = {
        "suites": {name: partial(suite, name) for name in names},
        "kept": KeptPrints(tmp_path / "cache", "0"),
        "allow_overlap": True,
        "overwrite": True,
    }

    def overlaps(kind: str, path: str) -> list[str]:
        drawn.clear()
        found = build({"kind": kind, "path": path}, **options)["overlap"]["found"]
        return [overlap["suite"] for overlap in found]

    assert (overlaps("folder", "images"), drawn) == ([], list(names))
    assert (overlaps("folder", "other"), drawn) == ([], [])
    shutil.copy(tmp_path / "exam.png", tmp_path / "images/c.png")
    assert (overlaps("folder", "images"), drawn) == (["pictures"], ["pictures"])
    assert (overlaps("jsonl", "x.jsonl"), drawn) == (["texts"], ["texts"])
    (kept,) = (tmp_path / "cache").glob("suite-none-*")
    kept.write_bytes(b"damaged")
    assert (overlaps("folder", "other"), drawn) == ([], ["none"])
    options["kept"] = KeptPrints(tmp_path / "cache", "1")  # drawn in another way now
    assert (overlaps("folder", "other"), drawn) == ([], list(names))
    assert len(list((tmp_path / "cache").iterdir())) == len(names)
