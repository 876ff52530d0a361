"""Conversations whose images lie in tar files beside them, as ``nvidia/Nemotron-VLM-Dataset-v2``.

A subset is a folder with ``SUBSET.jsonl``, whose messages are lists of ``{"type": "text"}`` and
``{"type": "image", "image": NAME}``, and ``media/*.tar`` with files of those names. Shards are
gigabytes, so a tar file is read from its beginning only as far as images are needed, and then the
conversations of these images are looked up. Those whose images are not all among them are passed
over, and so are subsets whose images are not in the repository: they have no shards.

The layout is that of the data set's ``data_format.md`` and of ModelOpt 0.47's reader.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nvvl.calib_data.items import Item
from nvvl.calib_data.jsonl_files import join_parts
from nvvl.calib_data.source_spec import Shards
from nvvl.calib_data.sources import IMAGE_SUFFIXES, ItemSource, failing_source
from nvvl.errors import DataError, first_line
from nvvl.model.prompt import Message
from nvvl.model.tiling import open_image

# Images read for each item wanted: some items have several, some images have no item.
_IMAGES_PER_ITEM = 2
# Of a file of an image, uncompressed; a tar file may itself be compressed, and hold anything.
_MOST_BYTES = 1 << 28


def shard_items(source: Shards, *, base: Path) -> Iterator[ItemSource]:
    """Find the shards of a subset, and list its conversations in the order of its images.

    Args:
        source: Which data set and subset.
        base: Folder that a local data set is relative to.

    Raises:
        DataError: naming the data set, if it does not exist or cannot be reached, has no shards, or
            a file is damaged.
    """
    import fsspec

    root = str(base / source.dataset)
    if not Path(root).is_dir():
        version = f"@{source.revision}" if source.revision else ""
        root = f"hf://datasets/{source.dataset}{version}"
    folder = f"{root}/{source.subset}"
    where = f"dataset {source.dataset} {source.subset}"
    with _reading(where):
        system, path = fsspec.core.url_to_fs(folder)
        shards = sorted(system.glob(f"{path}/media/*.tar"))[source.first_shard :]
    if not shards:
        raise DataError(f"{where}: required shards in {folder}/media, found none")
    pool_size = _IMAGES_PER_ITEM * (source.count or 1)
    return _conversations(system, shards, f"{path}/{source.subset}.jsonl", pool_size, where)


def _conversations(
    system: Any, shards: list[str], table: str, pool_size: int, where: str
) -> Iterator[ItemSource]:
    images = _images(system, shards)
    bad: set[int] = set()
    with _reading(where):
        while pool := _take(images, pool_size):
            with system.open(table, "rb") as lines:
                yield from _match(lines, pool, where, bad)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever the network, the Hub or a damaged archive raises
        raise DataError(f"{where}: cannot be read ({first_line(error)})") from None


def _images(system: Any, shards: list[str]) -> Iterator[tuple[str, bytes]]:
    for shard in shards:
        with (
            system.open(shard, "rb") as file,
            tarfile.open(fileobj=file, mode="r|*") as archive,
        ):
            for member in archive:
                if not member.isfile() or not member.name.lower().endswith(IMAGE_SUFFIXES):
                    continue
                if member.size > _MOST_BYTES:
                    raise DataError(
                        f"{shard}: {member.name}: required images of at most {_MOST_BYTES} bytes, "
                        f"got {member.size}; leave it out of the shard"
                    )
                stream = archive.extractfile(member)
                if stream is not None:
                    yield member.name, stream.read()


def _take(images: Iterator[tuple[str, bytes]], count: int) -> dict[str, bytes]:
    return dict(islice(images, count))


def _match(
    lines: IO[bytes], pool: Mapping[str, bytes], where: str, bad: set[int]
) -> Iterator[ItemSource]:
    """Yield the conversations of which every image is in the pool, and that have one.

    Broken lines are yielded once, and their numbers added to ``bad``.
    """
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            names = _image_names(row)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            if number not in bad:
                bad.add(number)
                yield failing_source(f"line {number}", _no_conversation(f"{where}:{number}", error))
            continue
        if names and all(name in pool for name in names):
            item_id = str(row.get("id", number))
            data = [pool[name] for name in names]
            yield ItemSource(item_id, partial(_make_item, row, data, item_id, f"{where}:{number}"))


def _no_conversation(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: required an object with messages of role and content ({error!r:.80})"
    )


def _image_names(row: Mapping[str, Any]) -> list[str]:
    return [
        part["image"]
        for message in row["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _make_item(row: Mapping[str, Any], data: list[bytes], item_id: str, where: str) -> Item:
    try:
        messages = tuple(
            Message(message["role"], _text(message["content"])) for message in row["messages"]
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (KeyError, TypeError) as error:
        raise _no_conversation(where, error) from None
    images = tuple(open_image(io.BytesIO(blob), name=where) for blob in data)
    return Item(item_id=item_id, messages=messages, images=images)


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else join_parts(content, "messages")
