import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvvl.calib_data.items import item_hash
from nvvl.calib_data.jsonl_files import jsonl_items
from nvvl.calib_data.sources import (
    DEFAULT_QUESTION,
    IMAGE_SUFFIXES,
    folder_items,
    generated_items,
)
from nvvl.errors import DataError

ASK = [{"role": "user", "content": "What is it?"}]


def save_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), color).save(path)
    return path


def write_lines(folder: Path, *rows: object) -> Path:
    path = folder / "items.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_generated_items_are_those_asked_for() -> None:
    kinds = ["card", "passage", "video", "card"]
    items = [source.load() for source in generated_items(kinds, seed=1, split="train")]
    assert [item.domain for item in items] == kinds
    assert len({item.item_id for item in items}) == 4
    assert items[0].messages != items[3].messages
    assert not items[1].images
    assert [message.role for message in items[1].messages] == ["user", "assistant"]


def test_generated_items_depend_on_seed_and_split() -> None:
    def hashes(**choice: Any) -> list[str]:
        return [item_hash(source.load()) for source in generated_items(["line"] * 3, **choice)]

    base = hashes(seed=0, split="train")
    assert base == hashes(seed=0, split="train")
    assert not set(base) & set(hashes(seed=1, split="train"))
    assert not set(base) & set(hashes(seed=0, split="held_out"))
    assert not set(base) & set(hashes(seed=0, split="train", fonts="held_out"))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(DataError, match="got letter, song"):
        generated_items(["song", "card", "letter"], seed=0, split="train")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "data:image/png;" + "A" * 5000, "messages": ASK}, r"A: cannot be read \("),
        ({"messages": [{"role": "user", "content": "cut \ud83d"}]}, "half a character in 'cut"),
        ({"id": "\ud83d", "messages": ASK}, "id: required a string"),
    ],
)
def test_lines_that_no_file_system_and_no_tokenizer_takes_are_named(
    tmp_path: Path, row: object, problem: str
) -> None:
    with pytest.raises(DataError, match=rf"items\.jsonl:1: .*{problem}") as caught:
        jsonl_items(write_lines(tmp_path, row))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"messages": ASK})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(jsonl_items(path)) == 1


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_folder_gives_each_kind_of_image_the_default_question(tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path / f"a{suffix}")
    (tmp_path / "notes.txt").write_text("not an image")
    (item,) = (source.load() for source in folder_items(tmp_path))
    assert item.item_id == f"a{suffix}"
    assert [(m.role, m.content) for m in item.messages] == [
        ("user", f"<image>\n{DEFAULT_QUESTION}")
    ]
    assert item.images[0].size == (6, 4)
    assert item.domain == "user"


def test_folder_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.PNG", "a.png"):
        save_image(tmp_path / name)
    assert [source.item_id for source in folder_items(tmp_path)] == ["a.png", "a/c.PNG", "b.png"]


def test_hidden_files_are_no_pictures_of_the_user(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".checkpoints/a.png"):
        save_image(tmp_path / name)
    assert [source.item_id for source in folder_items(tmp_path)] == ["a.png"]


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"required at least one image .* found none"):
        folder_items(tmp_path)
    with pytest.raises(DataError, match="absent: no such folder"):
        folder_items(tmp_path / "absent")


def test_unreadable_image_is_named_when_it_is_used(tmp_path: Path) -> None:
    save_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    bad, good = folder_items(tmp_path)
    good.load()
    with pytest.raises(DataError, match=r"bad.png"):
        bad.load()


def test_jsonl_lines_become_items(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", "red")
    save_image(tmp_path / "sub/b.png", "blue")
    answer = {"role": "assistant", "content": "Red"}
    path = write_lines(
        tmp_path,
        {"image": "a.png", "messages": [*ASK, answer]},
        "",
        {"images": ["sub/b.png", "a.png"], "messages": ASK, "id": "pair"},
        {
            "image": "a.png",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "In <image>?"},
            ],
        },
        {"messages": ASK},
    )
    one, pair, placed, text = (source.load() for source in jsonl_items(path))
    assert [m.content for m in one.messages] == ["<image>\nWhat is it?", "Red"]
    assert one.item_id == "items:1"
    assert pair.item_id == "pair"
    assert pair.messages[0].content == "<image>\n<image>\nWhat is it?"
    assert [image.getpixel((0, 0)) for image in pair.images] == [(0, 0, 255), (255, 0, 0)]
    assert [m.content for m in placed.messages] == ["Be brief.", "In <image>?"]
    assert text.item_id == "items:5"
    assert not text.images


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not valid JSON"),
        ([1], "required a JSON object, got list"),
        ({"text": "hi", "messages": ASK}, "unknown key text; required any of id, image"),
        ({"image": "a.png"}, "messages: required a list"),
        ({"image": "a.png", "messages": []}, "messages: required a list"),
        ({"messages": ["hi"]}, r"messages\[0\]: required an object with role and content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: required an object with role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"messages\[0\].content: required parts of type text, image or video",
        ),
        (
            {"messages": [{"role": "user", "content": [{"image_url": "data:" + "A" * 9000}]}]},
            "name pictures as image or images, beside messages",
        ),
        ({"messages": [{"role": "user", "content": {"a": "A" * 9000}}]}, "required a string"),
        ({"image": {"bytes": "A" * 9000}, "messages": ASK}, "image: required a path"),
        ({"images": {"a": "A" * 9000}, "messages": ASK}, "images: required a list of paths"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "conversations: required messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role must be .* got 'robot'"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "at least one of role user"),
        ({"image": "b.png", "messages": ASK}, "image: .*b.png: no such file"),
        ({"images": "a.png", "messages": ASK}, "images: required a list of paths"),
        ({"images": [3], "messages": ASK}, "image: required a path, got 3"),
        ({"image": "a.png", "images": [], "messages": ASK}, "image or images, got both"),
        ({"video": "a.mp4", "messages": ASK}, "video: .*a.mp4: no such file"),
        ({"id": 7, "messages": ASK}, "id: required a string, got 7"),
        (
            {
                "image": "a.png",
                "messages": [{"role": "user", "content": "<image> and <image>"}],
            },
            "do not match: 2 <image> for 1 files, 0 <video> for 0 files",
        ),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> for 0 files"),
        ({"id": "first", "messages": ASK}, "id 'first' is that of an earlier line"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, row: object, problem: str) -> None:
    save_image(tmp_path / "a.png")
    path = write_lines(tmp_path, {"id": "first", "messages": ASK}, "", row)
    with pytest.raises(DataError, match=rf"items.jsonl:3: .*{problem}") as caught:
        jsonl_items(path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_messages_in_parts_and_with_nulls_are_those_of_plain_ones(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    row = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    plain = {"role": "user", "content": "<image>\nWhat is it?"}
    path = write_lines(tmp_path, *({"image": "a.png", "messages": [turn]} for turn in (row, plain)))
    one, other = (source.load() for source in jsonl_items(path))
    assert one.messages == other.messages


def test_file_that_is_no_jsonl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read"):
        jsonl_items(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"items.jsonl: required at least one line"):
        jsonl_items(write_lines(tmp_path, "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(DataError, match=r"latin.jsonl: required UTF-8"):
        jsonl_items(tmp_path / "latin.jsonl")


def test_bad_lines_do_not_take_the_place_of_good_ones(tmp_path: Path) -> None:
    good = [{"id": f"items:{number}", "messages": ASK} for number in (2, 3)]
    path = write_lines(tmp_path, good[0], "{broken", "{broken", good[1])
    sources = jsonl_items(path, keep_bad=True)
    assert [source.item_id for source in sources] == ["items:2", "items:2", "items:3", "items:3"]
    assert [sources[place].load().item_id for place in (0, 3)] == ["items:2", "items:3"]
    for place, number in ((1, 2), (2, 3)):
        with pytest.raises(DataError, match=rf"items\.jsonl:{number}: not valid JSON"):
            sources[place].load()


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000])
def test_a_line_that_python_cannot_hold_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"items\.jsonl:1: not valid JSON"):
        jsonl_items(write_lines(tmp_path, line))
