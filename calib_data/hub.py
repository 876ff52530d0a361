"""Rows of any dataset, streamed with the library ``datasets``: nothing is downloaded as a whole.

A dataset is named as on the Hub, or is ``parquet`` or ``json`` with local files. No code of a
dataset is run. Images are decoded here, so that they are turned upright and refused as everywhere.
"""

import io
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.jsonl_files import parse_messages, place_media
from nvvl.calib_data.source_spec import Hub
from nvvl.calib_data.sources import ItemSource
from nvvl.calib_data.streams import open_dataset
from nvvl.calib_data.text_files import first_words, passage_item
from nvvl.errors import DataError, first_line, name_some
from nvvl.model.prompt import Message
from nvvl.model.tiling import open_image

# Builders that read files of the user's own.
LOCAL_BUILDERS = ("json", "parquet")

_NUM_NAMED = 20  # columns or files that an error names

# Where images that a row only names may be.
_REMOTE = ("https://", "http://", "hf://", "s3://", "gs://")


def hub_items(source: Hub, *, seed: int, base: Path) -> Iterator[ItemSource]:
    """Open a dataset, and stream its rows as items, as long as there are any.

    Args:
        source: Which dataset, and what its columns mean.
        seed: Of the shuffling.
        base: Folder that paths of local files are relative to.

    Raises:
        DataError: naming the dataset, if it does not exist or cannot be reached, or a column is
            missing.
    """
    return _row_items(source, _stream(source, seed, base))


def _row_items(source: Hub, rows: Iterator[Mapping[str, Any]]) -> Iterator[ItemSource]:
    for number in count():
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the network, the Hub or a builder raises
            raise DataError(f"{_name(source)}: cannot be read ({first_line(error)})") from None
        if row is None:
            return
        item_id = f"{source.config or source.split}-{number}"
        yield ItemSource(item_id, partial(_make_item, source, row, item_id))


def _stream(source: Hub, seed: int, base: Path) -> Iterator[Mapping[str, Any]]:
    from datasets.exceptions import DatasetNotFoundError

    files = list(source.data_files)
    if source.dataset in LOCAL_BUILDERS:
        files = [str(base / file) for file in files]
        absent = [file for file in files if not Path(file).exists()]
        if absent or not files:
            raise DataError(
                f"{_name(source)}: required data_files that exist, "
                f"{name_some(absent, limit=_NUM_NAMED) + ' do not' if absent else 'got none'}"
            )
    try:
        stream = open_dataset(
            source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            data_files=files or None,
        )
        stream = stream.decode(enable=False)
        _check_columns(source, list(stream.column_names or _first_row(stream)))
    except DataError:
        raise
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(
            f"{_name(source)}: no such dataset or file, or it is private ({first_line(error)})"
        ) from None
    except OSError as error:  # ConnectionError, and what HTTP clients derive from it
        raise DataError(
            f"{_name(source)}: the Hub cannot be reached ({first_line(error)}); try again online, "
            "or use local files with dataset = 'parquet' or 'json'"
        ) from None
    except Exception as error:  # whatever a builder raises
        raise DataError(f"{_name(source)}: {first_line(error)}") from None
    if source.shuffle:
        stream = stream.shuffle(seed=seed, buffer_size=source.shuffle)
    return iter(stream)


def _first_row(stream: Any) -> Mapping[str, Any]:
    return next(iter(stream), {})


def _check_columns(source: Hub, found: list[str]) -> None:
    wanted = (source.text, source.image, source.question, source.answer, source.messages)
    missing = sorted({column for column in wanted if column} - set(found))
    if missing:
        raise DataError(
            f"{_name(source)}: no column {', '.join(missing)}; there are "
            f"{name_some(found, limit=_NUM_NAMED)}"
        )


def _make_item(source: Hub, row: Mapping[str, Any], item_id: str) -> Item:
    where = f"{_name(source)}: {item_id}"
    domain = source.config or source.dataset
    if source.text:
        text = first_words(_string(row[source.text], source.text, where), source.words)
        return passage_item(text, item_id, domain)
    images = tuple(_images(row[source.image], where)) if source.image else ()
    try:
        if source.messages:
            messages = parse_messages(row[source.messages])
        else:
            messages = tuple(_ask(source, row, where))
        messages = place_media(messages, len(images), 0)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Item(item_id=item_id, messages=messages, images=images, domain=domain)


def _ask(source: Hub, row: Mapping[str, Any], where: str) -> Iterator[Message]:
    if source.question:
        yield Message("user", _string(row[source.question], source.question, where))
    else:
        yield Message("user", str(source.prompt))
    if source.answer:
        yield Message("assistant", _string(row[source.answer], source.answer, where))


def _string(value: object, column: str, where: str) -> str:
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column}: required a text, got {value!r:.60}")
    return value


def _images(value: object, where: str) -> Iterator[Image.Image]:
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, Mapping) or not (entry.get("bytes") or entry.get("path")):
            raise DataError(f"{where}: required an image with bytes or a path, got {entry!r:.60}")
        data = entry.get("bytes") or _download(str(entry["path"]), where)
        yield open_image(io.BytesIO(data), name=where)


def _download(url: str, where: str) -> bytes:
    """Read an image that a row only names; never a file of this machine that a dataset names."""
    import fsspec

    # "::" chains file systems, the last of which may be this machine's
    if not url.startswith(_REMOTE) or "::" in url:
        raise DataError(
            f"{where}: required the bytes of an image or a URL ({', '.join(_REMOTE)}), got "
            f"{url!r:.60}"
        )
    try:
        system, path = fsspec.core.url_to_fs(url)
        return bytes(system.cat_file(path))
    except Exception as error:  # whatever a client of the network raises
        raise DataError(f"{where}: {url:.200}: cannot be read ({first_line(error)})") from None


def _name(source: Hub) -> str:
    return " ".join(filter(None, ("dataset", source.dataset, source.config)))
