"""Items of a JSONL file.

A line is an object with ``messages``, a list of ``{"role": ..., "content": ...}``, and
optionally ``image`` (a path), ``images`` (paths), ``video`` (a path) and ``id``. Paths are relative
to the file. Messages without any placeholder get theirs at the start of the first user turn.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvvl.calib_data.sources import ItemSource, failing_source, file_source
from nvvl.errors import DataError, name_some
from nvvl.model.prompt import Message, is_text

_KEYS = ("id", "image", "images", "video", "messages")
_PLACEHOLDERS = ("<image>", "<video>")


def jsonl_items(path: Path, *, keep_bad: bool = False) -> list[ItemSource]:
    """Read the items of a JSONL file; blank lines are skipped.

    Args:
        path: The file.
        keep_bad: List a bad line as an item that cannot be made, in place of raising at once. Its
            id is its place in the file, and may be that of another item too.

    Raises:
        DataError: if the file is missing or empty, or a line is not as the module docstring says;
            the line is named.
    """
    sources: list[ItemSource] = []
    ids: set[str] = set()
    for number, line in _read_lines(path):
        default_id = f"{path.stem}:{number}"
        try:
            source = _parse_line(line, path.parent, default_id)
            if source.item_id in ids:
                raise DataError(f"id {source.item_id!r:.60} is that of an earlier line")
            ids.add(source.item_id)
        except DataError as error:
            named = DataError(f"{path}:{number}: {error}")
            if not keep_bad:
                raise named from None
            source = failing_source(default_id, named)
        sources.append(source)
    if not sources:
        raise DataError(f"{path}: required at least one line with an item, found none")
    return sources


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
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
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"required a JSON object, got {type(row).__name__}")
    unknown = sorted(set(row) - set(_KEYS))
    if "conversations" in unknown:
        raise DataError(
            "conversations: required messages, as role (user, assistant) and content in place of "
            "from (human, gpt) and value"
        )
    if unknown:
        raise DataError(
            f"unknown key {name_some(unknown, limit=5)}; required any of {', '.join(_KEYS)}"
        )
    images = _parse_images(row, folder)
    videos = (_find(folder, row["video"], "video"),) if "video" in row else ()
    messages = parse_messages(row.get("messages"))
    messages = place_media(messages, len(images), len(videos))
    item_id = row.get("id", default_id)
    if not isinstance(item_id, str) or not is_text(item_id):
        raise DataError(f"id: required a string, got {item_id!r:.60}")
    return file_source(item_id, messages, images, videos)


def _parse_images(row: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    if "image" in row and "images" in row:
        raise DataError("required image or images, got both")
    names = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(names, list):
        raise DataError(f"images: required a list of paths, got {names!r:.60}")
    return tuple(_find(folder, name, "image") for name in names)


def _find(folder: Path, name: object, what: str) -> Path:
    if not isinstance(name, str):
        raise DataError(f"{what}: required a path, got {name!r:.60}")
    path = folder / name
    try:
        is_file = path.is_file()
    except OSError as error:  # a name too long, such as the bytes of an image; or no right to look
        raise DataError(f"{what}: {name:.80}: cannot be read ({error.strerror})") from None
    if not is_file:
        raise DataError(f"{what}: {path}: no such file")
    return path


def parse_messages(rows: object) -> tuple[Message, ...]:
    """Read a list of ``{"role", "content"}`` objects.

    Raises:
        DataError: if it is none, or no turn is the user's.
    """
    if not isinstance(rows, list) or not rows:
        raise DataError("messages: required a list with at least one message")
    messages = []
    for index, row in enumerate(rows):
        where = f"messages[{index}]"
        # tables fill what one message has and another lacks with nulls
        is_object = isinstance(row, dict)
        keys = {key for key, value in row.items() if value is not None} if is_object else None
        if keys != {"role", "content"}:
            raise DataError(f"{where}: required an object with role and content, got {row!r:.60}")
        content = row["content"]
        if isinstance(content, list):
            content = join_parts(content, f"{where}.content")
        if not isinstance(content, str):
            raise DataError(f"{where}.content: required a string, got {content!r:.60}")
        messages.append(Message(row["role"], content))
    if not any(message.role == "user" for message in messages):
        raise DataError("messages: required at least one of role user")
    return tuple(messages)


def join_parts(parts: list[Any], where: str) -> str:
    """Write the parts of a message as one text, with placeholders for images and videos.

    Raises:
        DataError: if a part is neither text nor a placeholder; pictures are named beside messages.
    """
    pieces = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "video"):
            pieces.append(f"<{kind}>\n")
        else:
            raise DataError(
                f"{where}: required parts of type text, image or video, got {part!r:.60}; name "
                "pictures as image or images, beside messages"
            )
    return "".join(pieces)


def place_media(
    messages: tuple[Message, ...], num_images: int, num_videos: int
) -> tuple[Message, ...]:
    """Compare placeholders with media; if there are no placeholders, put them first.

    Raises:
        DataError: if some are there, and not as many as media.
    """
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
