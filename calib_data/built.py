"""A built calibration set on disk, written and read.

    OUT/manifest.json       the resolved spec, counts, what was left out and why, hashes
    OUT/items.parquet       one row an item: turns, names of pictures, token counts
    OUT/media/ab/ab12...    every image and frame once, as PNG under the hash of its pixels
    OUT/contact_sheet.png   a look at the set

Two builds of one spec give the same bytes. An item read back has the hash it was built with, or is
refused: the table is checked against the manifest, pictures against their names.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nvvl.calib_data.counts import TokenCounts
from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.media import read_picture, save_picture
from nvvl.calib_data.sources import ItemSource
from nvvl.calib_data.streams import open_dataset
from nvvl.errors import DataError, first_line
from nvvl.model.hashing import hash_file
from nvvl.model.prompt import Message
from nvvl.model.video import Video

FORMAT = "nvvl calibration set"
VERSION = 1
MANIFEST = "manifest.json"
TABLE = "items.parquet"
SHEET = "contact_sheet.png"

Row = dict[str, Any]

# What items are made of; the other columns only count.
_SHAPE = {
    **dict.fromkeys(("id", "sha256", "domain"), str),
    "messages": [{"role": str, "content": str}],
    "images": [str],
    "videos": [{"fps": float, "frame_indices": [int], "frames": [str]}],
}


def is_built(folder: Path) -> bool:
    """Tell whether a folder has the files of a built set."""
    return (folder / MANIFEST).is_file() and (folder / TABLE).is_file()


def item_row(item: Item, counts: TokenCounts, source: str, folder: Path) -> Row:
    """Store an item's pictures below a folder and return its row of the table."""
    return {
        "id": item.item_id,
        "sha256": item_hash(item),
        "source": source,
        "domain": item.domain,
        "messages": [{"role": m.role, "content": m.content} for m in item.messages],
        "images": [save_picture(image, folder) for image in item.images],
        "videos": [
            {
                "fps": video.fps,
                "frame_indices": list(video.frame_indices),
                "frames": [save_picture(frame, folder) for frame in video.frames],
            }
            for video in item.videos
        ],
        "text_tokens": counts.text,
        "image_tokens": counts.image,
        "video_tokens": counts.video,
        "answer_tokens": counts.answer,
        "tiles": list(counts.tiles),
    }


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Write the table of items."""
    import datasets

    string, integer = datasets.Value("string"), datasets.Value("int64")
    numbers = [datasets.Value("int64")]
    names = [string]
    features = datasets.Features(
        {
            "id": string,
            "sha256": string,
            "source": string,
            "domain": string,
            "messages": [{"role": string, "content": string}],
            "images": names,
            "videos": [
                {"fps": datasets.Value("float64"), "frame_indices": numbers, "frames": names}
            ],
            **{f"{kind}_tokens": integer for kind in ("text", "image", "video", "answer")},
            "tiles": numbers,
        }
    )
    with _quiet_datasets():
        table = datasets.Dataset.from_list(list(rows), features=features)
        table.to_parquet(folder / TABLE)


def write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Write the manifest, with the hash of the table and the contact sheet.

    What of a file name is no UTF-8, a lone surrogate in Python, is escaped as JSON does it.
    """
    files = {name: hash_file(folder / name) for name in (TABLE, SHEET)}
    text = json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_bytes(text.encode(errors="backslashreplace"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a built set.

    Raises:
        DataError: if it is missing, or not one of a calibration set that this version reads.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else ()
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path}: required a {FORMAT} of version {VERSION}, got {found!r:.80}; build it again "
            "with nvvl calib build"
        )
    return dict(manifest)


def read_rows(folder: Path) -> list[Row]:
    """Read the table of a built set.

    Raises:
        DataError: if it is not the one that the manifest names, or not one of items.
    """
    files = read_manifest(folder).get("files")
    path = folder / TABLE
    try:
        found = hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if found != (files.get(TABLE) if isinstance(files, dict) else None):
        raise DataError(f"{path}: is not the table that {MANIFEST} names; build the set again")
    try:
        # streamed, for reading it as a whole would leave a copy in the user's cache
        rows: list[Row] = list(open_dataset("parquet", data_files=str(path), split="train"))
    except Exception as error:  # whatever a reader of Parquet raises
        raise DataError(
            f"{path}: cannot be read ({first_line(error)}); build the set again"
        ) from None
    for number, row in enumerate(rows):
        if not _fits(row, _SHAPE):
            raise DataError(
                f"{path}: row {number}: required {', '.join(_SHAPE)} as nvvl calib build writes "
                "them; build the set again"
            )
    return rows


def _fits(value: object, shape: Any) -> bool:
    """Tell whether plain values have the keys and types of a shape; they may have more keys."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and _fits(value[key], part) for key, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(entry, shape[0]) for entry in value)
    return isinstance(value, shape)


def built_items(folder: Path) -> list[ItemSource]:
    """List the items of a built set; their pictures are read when they are used.

    Raises:
        DataError: as `read_rows`.
    """
    return [ItemSource(row["id"], partial(_load, row, folder)) for row in read_rows(folder)]


def _load(row: Row, folder: Path) -> Item:
    item = Item(
        item_id=row["id"],
        messages=tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]),
        images=tuple(read_picture(folder, name) for name in row["images"]),
        videos=tuple(
            Video(
                tuple(read_picture(folder, name) for name in video["frames"]),
                video["fps"],
                tuple(video["frame_indices"]),
            )
            for video in row["videos"]
        ),
        domain=row["domain"],
    )
    if item_hash(item) != row["sha256"]:
        raise DataError(f"{folder}: item {item.item_id} is not what was built; build the set again")
    return item


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the library ``datasets`` from drawing progress bars of its own."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
