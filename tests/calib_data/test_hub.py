"""Datasets read through ``datasets`` streaming: local files, and what goes wrong online."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from nvvl.calib_data.built import read_rows
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.errors import DataError

Build = Callable[..., dict[str, Any]]

TABLE = {"kind": "hub", "dataset": "parquet", "data_files": ["rows.parquet"], "name": "rows"}


def png(color: str, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three rows, the last with a broken image."""
    path = tmp_path / "rows.parquet"
    images = [png("red"), png("blue", (20, 20)), b"no image"]
    rows = {
        "picture": [{"bytes": data, "path": None} for data in images],
        "ask": ["What colour?", "<image> And this?", "This?"],
        "say": [["red", "dark red"], ["blue"], ["none"]],
        "article": ["One two three four five six.", "Seven eight nine ten.", "x"],
        "turns": [
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            [{"role": "user", "content": "Look"}],
            [{"role": "robot", "content": "Hm"}],
        ],
    }
    columns = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    datasets.disable_progress_bars()
    columns.to_parquet(path)
    datasets.enable_progress_bars()
    return path


@pytest.mark.usefixtures("table")
def test_images_with_questions_and_answers(build: Build, tmp_path: Path) -> None:
    build({**TABLE, "image": "picture", "question": "ask", "answer": "say", "count": 2})
    first, second = load_calibration_set(tmp_path / "out", num_items=2).items
    assert [message.content for message in first.messages] == ["<image>\nWhat colour?", "red"]
    assert [message.content for message in second.messages] == ["<image> And this?", "blue"]
    assert [item.images[0].getpixel((0, 0)) for item in (first, second)] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert (first.item_id, first.domain) == ("rows/train-0", "parquet")


@pytest.mark.usefixtures("table")
def test_one_prompt_for_all_images(build: Build, tmp_path: Path) -> None:
    build({**TABLE, "image": "picture", "prompt": "Describe it.", "count": 1, "domain": "photo"})
    (item,) = load_calibration_set(tmp_path / "out", num_items=2).items
    assert [message.content for message in item.messages] == ["<image>\nDescribe it."]
    assert item.domain == "photo"


@pytest.mark.usefixtures("table")
def test_texts_and_messages(build: Build, tmp_path: Path) -> None:
    build({**TABLE, "text": "article", "words": 4, "count": 2})
    items = load_calibration_set(tmp_path / "out", num_items=2).items
    assert [[m.content for m in item.messages] for item in items] == [
        ["Continue the text.\nOne two", "three four"],
        ["Continue the text.\nSeven eight", "nine ten."],
    ]
    build({**TABLE, "messages": "turns", "count": 2}, out="turns")
    first, second = load_calibration_set(tmp_path / "turns", num_items=2).items
    assert [m.content for m in first.messages] == ["Hi", "Hello"]
    assert [m.content for m in second.messages] == ["Look"]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"image": "picture", "prompt": "?"}, "train-2: not an image"),
        ({"text": "article"}, "train-2: required a text of at least 2 words"),
        ({"messages": "turns"}, "train-2: message: role must be"),
    ],
)
def test_a_bad_row_is_named_or_skipped(build: Build, columns: dict[str, str], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        build({**TABLE, **columns, "count": 3})
    with pytest.raises(DataError, match=r"required 3 items, got 2 \(1 bad"):
        build({**TABLE, **columns, "count": 3}, skip_bad=True)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": "body"}, r"dataset parquet: no column body; there are .*article"),
        ({"text": "article", "data_files": ["x.parquet"]}, r"data_files that exist, .*x.parquet"),
        ({"text": "article", "data_files": []}, "data_files that exist, got none"),
        ({"text": "article", "split": "test"}, "dataset parquet: .*split"),
    ],
)
def test_what_a_dataset_lacks_is_named(build: Build, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        build({**TABLE, "count": 1, **change})


def test_a_dataset_of_bad_rows_alone_is_given_up(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.calib_data.build._MOST_LEFT_OUT", 5)
    lines = [json.dumps({"ask": "Why?", "say": number}) for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {**TABLE, "dataset": "json", "data_files": ["rows.jsonl"], "count": 10}
    with pytest.raises(DataError, match=r"got 0 \(5 bad, .*; the first bad one: .*train-0: mess"):
        build({**source, "messages": "say"}, skip_bad=True)


def test_json_lines_are_read(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a b c d"}\n{"body": "e f g h"}\n')
    build(
        {
            **{"kind": "hub", "dataset": "json", "data_files": ["a.jsonl"]},
            **{"text": "body", "count": 2, "shuffle": 8},
        }
    )
    assert len(read_rows(tmp_path / "out")) == 2


def test_shuffling_follows_the_seed(build: Build, tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"word number {index} here"}) for index in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = {"kind": "hub", "dataset": "json", "data_files": ["a.jsonl"], "text": "body"}
    hashes = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        build({**source, "count": 5, "shuffle": 40, "seed": seed}, out=out)
        hashes.append([row["sha256"] for row in read_rows(tmp_path / out)])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ConnectionError("Couldn't reach it (timed out)\nmore"), r"cannot be reached \(Couldn't"),
        (datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist"), "no such dataset"),
        (ValueError("BuilderConfig 'x' not found"), "dataset some/set: BuilderConfig 'x' not"),
        (RuntimeError("Dataset scripts are no longer supported"), "dataset some/set: Dataset scri"),
    ],
)
def test_datasets_that_cannot_be_had_give_one_line(
    build: Build, monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=problem) as caught:
        build({"kind": "hub", "dataset": "some/set", "text": "body", "count": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "file://", "simplecache::file://", "https://a::file://"])
def test_a_file_of_this_machine_that_a_dataset_names_is_not_read(
    build: Build, tmp_path: Path, prefix: str
) -> None:
    (tmp_path / "secret.png").write_bytes(png("red"))
    with pytest.raises(DataError, match="required the bytes of an image or a URL"):
        build(naming(tmp_path, f"{prefix}{tmp_path / 'secret.png'}"))


def naming(folder: Path, url: str) -> dict[str, Any]:
    """Write a dataset whose one image is only named, and return it as a source."""
    row = {"picture": {"path": url, "bytes": None}, "ask": "What?"}
    (folder / "a.jsonl").write_text(json.dumps(row))
    return {
        **{"kind": "hub", "dataset": "json", "data_files": ["a.jsonl"], "name": "rows"},
        **{"image": "picture", "question": "ask", "count": 1},
    }


def test_an_image_that_the_network_does_not_give_is_a_bad_item(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    class RefusedError(Exception):
        """As clients of the network raise it: no OSError."""

    def fail(_: str) -> None:
        raise RefusedError("403, message='Forbidden'")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(DataError, match=r"https://a/b\.png: cannot be read \(403, message"):
        build(naming(tmp_path, "https://a/b.png"))


def write_shards(folder: Path, lines: Sequence[object], *shards: dict[str, bytes]) -> None:
    """Write a subset as ``nvidia/Nemotron-VLM-Dataset-v2`` has them."""
    (folder / "set/tables/media").mkdir(parents=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "set/tables/tables.jsonl").write_text(text)
    for number, files in enumerate(shards):
        with tarfile.open(folder / f"set/tables/media/shard_{number:06d}.tar", "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def conversation(name: str, *images: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    ask = {"role": "user", "content": [*parts, {"type": "text", "text": f"Read {name}."}]}
    say = {"role": "assistant", "content": [{"type": "text", "text": name.upper()}]}
    return {"id": name, "messages": [ask, say]}


SHARDS = {"kind": "shards", "name": "s", "dataset": "set", "subset": "tables", "domain": "table"}


def test_conversations_are_joined_with_the_images_of_shards(build: Build, tmp_path: Path) -> None:
    lines = [
        conversation("elsewhere", "missing.png"),
        conversation("b", "b.png"),
        conversation("text"),
        conversation("pair", "a.png", "c.png"),
        conversation("a", "a.png"),
    ]
    colors = {"a.png": png("red"), "b.png": png("blue"), "notes.txt": b"x"}
    write_shards(tmp_path, lines, colors, {"c.png": png("lime", (30, 10))})
    build({**SHARDS, "count": 3})
    b, pair, a = load_calibration_set(tmp_path / "out", num_items=9).items
    assert [item.item_id for item in (b, pair, a)] == ["s/b", "s/pair", "s/a"]
    assert [message.content for message in b.messages] == ["<image>\nRead b.", "B"]
    assert pair.messages[0].content == "<image>\n<image>\nRead pair."
    assert [image.getpixel((0, 0)) for image in pair.images] == [(255, 0, 0), (0, 255, 0)]
    assert {item.domain for item in (a, b, pair)} == {"table"}


def test_only_as_much_of_the_shards_is_read_as_is_needed(build: Build, tmp_path: Path) -> None:
    images = {"a.png": png("red"), "b.png": png("blue")}
    write_shards(tmp_path, [conversation("a", "a.png")], images, {})
    (tmp_path / "set/tables/media/shard_000001.tar").write_bytes(b"broken")
    build({**SHARDS, "count": 1})
    with pytest.raises(DataError, match="dataset set tables: cannot be read"):
        build({**SHARDS, "count": 2}, out="two")


def test_shards_that_cannot_be_used_are_named(build: Build, tmp_path: Path) -> None:
    write_shards(tmp_path, ["{", conversation("a", "a.png")], {"a.png": b"no image"})
    with pytest.raises(DataError, match=r"s: dataset set tables:1: .*JSONDecodeError"):
        build({**SHARDS, "count": 1})
    with pytest.raises(DataError, match=r"got 0 \(2 bad"):
        build({**SHARDS, "count": 1}, skip_bad=True)
    with pytest.raises(DataError, match=r"required shards in .*tables/media, found none"):
        build({**SHARDS, "count": 1, "first_shard": 7})


def test_a_broken_line_of_shards_is_one_bad_item_however_often_it_is_read(
    build: Build, tmp_path: Path
) -> None:
    nobody = conversation("c", "c.png")
    del nobody["messages"][0]["role"]
    lines = ["{", nobody, conversation("d", "d.png"), conversation("f", "f.png")]
    pictures = {f"{name}.png": png("red", (8 + i, 8)) for i, name in enumerate("abcdef")}
    write_shards(tmp_path, lines, pictures)
    bad = build({**SHARDS, "count": 2}, skip_bad=True)["sources"][0]["bad"]
    assert [entry["id"] for entry in bad] == ["line 1", "c"]
    assert bad[1]["reason"].endswith(
        "tables:2: required an object with messages of role and content (KeyError('role'))"
    )


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [conversation("a", "a.png")], {"a.png": bytes(1 << 20)})
    (shard,) = (tmp_path / "set/tables/media").iterdir()
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert shard.stat().st_size < 1 << 14
    monkeypatch.setattr("nvvl.calib_data.shards._MOST_BYTES", 1 << 19)
    monkeypatch.delattr("tarfile.TarFile.extractfile")
    with pytest.raises(
        DataError, match=r"a\.png: required images of at most 524288 bytes, got 1048"
    ):
        build({**SHARDS, "count": 1})


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000])
def test_a_line_of_shards_that_python_cannot_hold_is_named(
    line: str, build: Build, tmp_path: Path
) -> None:
    write_shards(tmp_path, [line], {"a.png": png("red")})
    with pytest.raises(DataError, match=r"s: dataset set tables:1: .*\((Recursion|Value)Error"):
        build({**SHARDS, "count": 1})


@pytest.mark.parametrize("kind", [ConnectionError, Exception, TimeoutError])
def test_a_dataset_of_shards_that_cannot_be_reached_is_named(
    build: Build, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    import fsspec

    def fail(url: str) -> None:
        raise kind(f"no route to {url}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(DataError, match=r"s: dataset no/such tables: cannot be .*hf://datasets"):
        build({**SHARDS, "dataset": "no/such", "count": 1})
