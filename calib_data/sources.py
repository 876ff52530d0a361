"""Where items come from: the document generator, a user's folder of images, or a JSONL file.

Each reader checks names, fields and paths at once, but returns `ItemSource`s that read or draw
pixels only when an item is used: a set of a thousand pages needs no memory for a thousand pages.

A JSONL line is an object with ``messages``, a list of ``{"role": ..., "content": ...}``, and
optionally ``image`` (a path), ``images`` (paths), ``video`` (a path) and ``id``. Paths are relative
to the file. Messages without any placeholder get theirs at the start of the first user turn.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nvvl.calib_data.documents import KINDS, make_document
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.items import Item, document_item
from nvvl.calib_data.texts import text_passage
from nvvl.calib_data.video_files import read_video
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.tiling import open_image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_QUESTION = "Describe the image."
CONTINUE = "Continue the text."
PASSAGE = "passage"  # kind of items without images

_KEYS = ("id", "image", "images", "video", "messages")
_PLACEHOLDERS = ("<image>", "<video>")


@dataclass(frozen=True)
class ItemSource:
    """An item that is made when it is needed."""

    item_id: str
    load: Callable[[], Item]


def generated_items(
    kinds: Sequence[str], *, seed: int, split: Split, fonts: Split = "train"
) -> list[ItemSource]:
    """Make generated items, one for each entry of ``kinds``.

    Args:
        kinds: Kinds of documents, or `PASSAGE` for text alone.
        seed: Another seed gives other items throughout.
        split: Which strings may occur as answers.
        fonts: Which font families may occur.

    Raises:
        DataError: if a kind is unknown.
    """
    unknown = sorted(set(kinds) - {*KINDS, PASSAGE})
    if unknown:
        raise DataError(
            f"generated items: required kinds of {', '.join((*KINDS, PASSAGE))}, got "
            f"{', '.join(unknown)}"
        )
    sources = []
    for index, kind in enumerate(kinds):
        item_id = f"{kind}-{split}-{seed}-{index}"
        number = (seed << 32) + index
        draw = _passage_item if kind == PASSAGE else partial(_generated_item, kind, fonts)
        sources.append(ItemSource(item_id, partial(draw, number, split, item_id)))
    return sources


def _generated_item(kind: str, fonts: Split, number: int, split: Split, item_id: str) -> Item:
    return document_item(make_document(kind, number, split=split, fonts=fonts), item_id)


def _passage_item(number: int, split: Split, item_id: str) -> Item:
    """Split a passage in two: the model is given the first half and answers the second."""
    words = text_passage(number, split).split(" ")
    half = len(words) // 2
    messages = (
        Message("user", f"{CONTINUE}\n{' '.join(words[:half])}"),
        Message("assistant", " ".join(words[half:])),
    )
    return Item(item_id=item_id, messages=messages, domain=PASSAGE)


def folder_items(folder: Path) -> list[ItemSource]:
    """List the images below a folder, sorted by path, each with `DEFAULT_QUESTION`.

    Raises:
        DataError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not paths:
        raise DataError(
            f"{folder}: required at least one image ({', '.join(IMAGE_SUFFIXES)}), found none"
        )
    messages = (Message("user", f"<image>\n{DEFAULT_QUESTION}"),)
    return [_file_source(path.relative_to(folder).as_posix(), messages, (path,)) for path in paths]


def jsonl_items(path: Path) -> list[ItemSource]:
    """Read the items of a JSONL file; blank lines are skipped.

    Raises:
        DataError: if the file is missing or empty, or a line is not as the module docstring says;
            the line is named.
    """
    sources: dict[str, ItemSource] = {}
    for number, line in _read_lines(path):
        try:
            source = _parse_line(line, path.parent, f"{path.stem}:{number}")
            if source.item_id in sources:
                raise DataError(f"id {source.item_id!r} is that of an earlier line")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        sources[source.item_id] = source
    if not sources:
        raise DataError(f"{path}: required at least one line with an item, found none")
    return list(sources.values())


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: required UTF-8 text ({error})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: str, folder: Path, default_id: str) -> ItemSource:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"required a JSON object, got {type(row).__name__}")
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise DataError(f"unknown key {', '.join(unknown)}; required any of {', '.join(_KEYS)}")
    images = _parse_images(row, folder)
    videos = (_find(folder, row["video"], "video"),) if "video" in row else ()
    messages = _parse_messages(row.get("messages"))
    messages = _place_media(messages, len(images), len(videos))
    item_id = row.get("id", default_id)
    if not isinstance(item_id, str):
        raise DataError(f"id: required a string, got {item_id!r}")
    return _file_source(item_id, messages, images, videos)


def _parse_images(row: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    if "image" in row and "images" in row:
        raise DataError("required image or images, got both")
    names = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(names, list):
        raise DataError(f"images: required a list of paths, got {names!r}")
    return tuple(_find(folder, name, "image") for name in names)


def _find(folder: Path, name: object, what: str) -> Path:
    if not isinstance(name, str):
        raise DataError(f"{what}: required a path, got {name!r}")
    path = folder / name
    if not path.is_file():
        raise DataError(f"{what}: {path}: no such file")
    return path


def _parse_messages(rows: object) -> tuple[Message, ...]:
    if not isinstance(rows, list) or not rows:
        raise DataError("messages: required a list with at least one message")
    messages = []
    for index, row in enumerate(rows):
        where = f"messages[{index}]"
        if not isinstance(row, dict) or set(row) != {"role", "content"}:
            raise DataError(f"{where}: required an object with role and content, got {row!r}")
        if not isinstance(row["content"], str):
            raise DataError(f"{where}.content: required a string, got {row['content']!r}")
        messages.append(Message(row["role"], row["content"]))
    if not any(message.role == "user" for message in messages):
        raise DataError("messages: required at least one of role user")
    return tuple(messages)


def _place_media(
    messages: tuple[Message, ...], num_images: int, num_videos: int
) -> tuple[Message, ...]:
    """Compare placeholders with media; if there are no placeholders, put them first."""
    text = "".join(message.content for message in messages)
    found = tuple(text.count(token) for token in _PLACEHOLDERS)
    given = (num_images, num_videos)
    if found == given:
        return messages
    if any(found):
        counts = ", ".join(
            f"{there} {token} for {files} files"
            for token, there, files in zip(_PLACEHOLDERS, found, given, strict=True)
        )
        raise DataError(f"messages: placeholders and media do not match: {counts}")
    media = "<image>\n" * num_images + "<video>\n" * num_videos
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    asked = replace(messages[first], content=media + messages[first].content)
    return (*messages[:first], asked, *messages[first + 1 :])


def _file_source(
    item_id: str,
    messages: tuple[Message, ...],
    images: tuple[Path, ...],
    videos: tuple[Path, ...] = (),
) -> ItemSource:
    return ItemSource(item_id, partial(_load_files, item_id, messages, images, videos))


def _load_files(
    item_id: str,
    messages: tuple[Message, ...],
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
) -> Item:
    return Item(
        item_id=item_id,
        messages=messages,
        images=tuple(open_image(path) for path in images),
        videos=tuple(read_video(path) for path in videos),
        domain="user",
    )
