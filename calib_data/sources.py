"""Where items come from: the document generator, folders of images, videos (JSONL: jsonl_files).

Each reader checks names, fields and paths at once, but returns `ItemSource`s that read or draw
pixels only when an item is used: a set of a thousand pages needs no memory for a thousand pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nvvl.calib_data.documents import KINDS, make_document
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.items import Item, document_item
from nvvl.calib_data.texts import text_passage
from nvvl.calib_data.video_files import read_video
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.tiling import open_image

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
DEFAULT_QUESTION = "Describe the image."
CONTINUE = "Continue the text."
PASSAGE = "passage"  # kind of items without images
NUM_NUMBERS = 1 << 32  # of generated items that a seed has; behind them are those of the next


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
    return [
        generated_item(kind, index, seed=seed, split=split, fonts=fonts)
        for index, kind in enumerate(kinds)
    ]


def generated_item(kind: str, index: int, *, seed: int, split: Split, fonts: Split) -> ItemSource:
    """Make one generated item; its number and the seed decide what it is."""
    item_id = f"{kind}-{split}-{seed}-{index}"
    number = seed * NUM_NUMBERS + index
    draw = _passage_item if kind == PASSAGE else partial(_generated_item, kind, fonts)
    return ItemSource(item_id, partial(draw, number, split, item_id))


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


def failing_source(item_id: str, error: DataError) -> ItemSource:
    """Return an item that cannot be made: using it raises the error that listing it met."""
    return ItemSource(item_id, partial(_fail, str(error)))


def _fail(message: str) -> Item:
    raise DataError(message)


def folder_items(folder: Path, question: str = DEFAULT_QUESTION) -> list[ItemSource]:
    """List the images below a folder, sorted by path, each with one question.

    Raises:
        DataError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    messages = (Message("user", f"<image>\n{question}"),)
    paths = list_files(folder, IMAGE_SUFFIXES, "image")
    return [file_source(name, messages, (path,)) for name, path in paths.items()]


def video_items(path: Path, question: str) -> list[ItemSource]:
    """List a video file, or those below a folder, sorted by path, each with one question.

    Raises:
        DataError: if there is no such file or folder, or no video in it.
    """
    messages = (Message("user", f"<video>\n{question}"),)
    paths = list_files(path, VIDEO_SUFFIXES, "video")
    return [file_source(name, messages, (), (file,)) for name, file in paths.items()]


def list_files(path: Path, suffixes: Sequence[str], what: str) -> dict[str, Path]:
    """List one file, or the files of certain suffixes below a folder, by name in sorted order.

    Raises:
        DataError: if there is no such file or folder, or no such file in it.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    named = {file.relative_to(path): file for file in files if file.is_file()}
    # what is hidden is a system's: copies, and Apple's "._photo.jpg", which holds no picture
    found = {
        name.as_posix(): file
        for name, file in named.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    if not found:
        raise DataError(f"{path}: required at least one {what} ({', '.join(suffixes)}), found none")
    return dict(sorted(found.items()))


def file_source(
    item_id: str,
    messages: tuple[Message, ...],
    images: tuple[Path, ...],
    videos: tuple[Path, ...] = (),
) -> ItemSource:
    """Return an item whose media are read from files when it is used."""
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
