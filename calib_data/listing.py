"""Which items a calibration set has, from its name: the default mixture, or a user's own files."""

import random
from pathlib import Path

from nvvl.calib_data.built import built_items, is_built
from nvvl.calib_data.jsonl_files import jsonl_items
from nvvl.calib_data.sources import (
    PASSAGE,
    ItemSource,
    folder_items,
    generated_items,
)
from nvvl.errors import DataError

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


def list_items(spec: str | Path, *, num_items: int, seed: int) -> list[ItemSource]:
    """List the items of a calibration set, without reading pixels.

    Args:
        spec: ``default`` for generated documents, else a set built with ``nvvl calib build``, a
            folder of images (or with one JSONL file), or a ``.jsonl`` file.
        num_items: How many items to take; of a user's files fewer if there are fewer.
        seed: Which documents are generated, or which of the user's items are taken.

    Raises:
        DataError: if num_items is not positive, the path does not exist or holds no items, or a
            line of JSONL is malformed.
    """
    if num_items < 1:
        raise DataError(f"calibration set: required at least one item, got num_items={num_items}")
    if spec == DEFAULT:
        kinds = [MIXTURE[index % len(MIXTURE)] for index in range(num_items)]
        return generated_items(kinds, seed=seed, split="train")
    sources = list_own(Path(spec))
    if len(sources) <= num_items:
        return sources
    chosen = random.Random(seed).sample(range(len(sources)), num_items)
    return [sources[index] for index in sorted(chosen)]


def list_own(path: Path) -> list[ItemSource]:
    """List all items of a set on disk.

    Raises:
        DataError: as `list_items`.
    """
    if path.suffix == ".toml":
        raise DataError(
            f"{path}: is the spec of a set; build it with: nvvl calib build {path} OUT, and give "
            "OUT"
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
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{path}: holds several JSONL files ({names}); name the one to use")
    return jsonl_items(tables[0]) if tables else folder_items(path)
