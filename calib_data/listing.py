"""Which items a calibration set has, from its name: the default mixture, or a user's own files."""

import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from nvvl.calib_data.built import built_items, is_built
from nvvl.calib_data.jsonl_files import jsonl_items
from nvvl.calib_data.sources import (
    NUM_NUMBERS,
    PASSAGE,
    ItemSource,
    folder_items,
    generated_item,
)
from nvvl.errors import DataError, name_some

DEFAULT = "default"

# The default mixture repeats this, so a smaller set is the beginning of a larger one.
MIXTURE = (
    "card",
    PASSAGE,
    "line",
    "table",
    "page",
    "text",
    "video",
    "card",
    "line",
    "chart",
    "two_pages",
    "card",
    "table",
    "receipt",
    "page",
    "card",
)


def list_items(spec: str | Path, *, num_items: int, seed: int) -> Sequence[ItemSource]:
    """List the items of a calibration set, without reading pixels.

    Args:
        spec: ``default`` for generated documents, else a set built with ``nvvl calib build``, a
            folder of images (or with one JSONL file), or a ``.jsonl`` file.
        num_items: How many items to take; of a user's files fewer if there are fewer.
        seed: Which documents are generated, or which of the user's items are taken.

    Raises:
        DataError: if num_items is not positive, or more than can be generated; if the path does not
            exist or holds no items, or a line of JSONL is malformed.
    """
    if num_items < 1:
        raise DataError(f"calibration set: required at least one item, got {num_items}")
    if spec == DEFAULT:
        if num_items > NUM_NUMBERS:
            raise DataError(
                f"{DEFAULT}: required at most {NUM_NUMBERS} items, got {num_items}; more there are "
                "not of one seed"
            )
        return _Mixture(range(num_items), seed)
    sources = list_own(Path(spec))
    if len(sources) <= num_items:
        return sources
    chosen = random.Random(seed).sample(range(len(sources)), num_items)
    return [sources[index] for index in sorted(chosen)]


class _Mixture(Sequence[ItemSource]):
    """The default mixture, or a part of it, listed as it is read: however long, it takes no memory.

    Args:
        places: Which items of it.
        seed: Another seed gives other items throughout.
    """

    def __init__(self, places: range, seed: int) -> None:
        self._places = places
        self._seed = seed

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> ItemSource: ...
    @overload
    def __getitem__(self, index: slice) -> "_Mixture": ...
    def __getitem__(self, index: int | slice) -> "ItemSource | _Mixture":
        place = self._places[index]
        if isinstance(place, range):
            return _Mixture(place, self._seed)
        kind = MIXTURE[place % len(MIXTURE)]
        return generated_item(kind, place, seed=self._seed, split="train", fonts="train")


def list_own(path: Path) -> list[ItemSource]:
    """List all items of a set on disk.

    Raises:
        DataError: as `list_items`.
    """
    if path.suffix == ".toml":
        raise DataError(
            f"{path}: is the spec of a set; build it with: nvvl calib build "
            f"{shlex.quote(str(path))} OUT, and give OUT"
        )
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: required a built set, a folder of images or a .jsonl file")
        return jsonl_items(path)
    if not path.is_dir():
        raise DataError(
            f"{path}: no such file or folder; required {DEFAULT!r}, a built set, a folder of "
            "images or a .jsonl file"
        )
    if is_built(path):
        return built_items(path)
    tables = sorted(path.glob("*.jsonl"))
    if len(tables) > 1:
        names = name_some([table.name for table in tables], limit=5)
        raise DataError(f"{path}: holds several JSONL files ({names}); name the one to use")
    return jsonl_items(tables[0]) if tables else folder_items(path)
