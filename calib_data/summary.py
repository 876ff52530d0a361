"""What a built set holds, in numbers: items, tokens by modality and domain, tiles an image."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nvvl.calib_data.built import Row

MODALITIES = ("text", "image", "video")


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Count what the rows of a set hold.

    Returns:
        Plain values: numbers of the whole set, the same by domain, how many images have how many
        tiles, and the number of different pictures.
    """
    domains = sorted({row["domain"] for row in rows})
    tiles = Counter(num_tiles for row in rows for num_tiles in row["tiles"])
    return {
        **_count(rows),
        "num_pictures": len({name for row in rows for name in _picture_names(row)}),
        "longest_item_tokens": max(_num_tokens(row) for row in rows),
        "images_by_tiles": {str(num_tiles): tiles[num_tiles] for num_tiles in sorted(tiles)},
        "domains": {
            domain: _count([row for row in rows if row["domain"] == domain]) for domain in domains
        },
    }


def _count(rows: Sequence[Row]) -> dict[str, int]:
    counts = {
        "num_items": len(rows),
        "num_images": sum(len(row["images"]) for row in rows),
        "num_videos": sum(len(row["videos"]) for row in rows),
    }
    for kind in (*MODALITIES, "answer"):
        counts[f"{kind}_tokens"] = sum(row[f"{kind}_tokens"] for row in rows)
    return counts


def _num_tokens(row: Row) -> int:
    return sum(row[f"{kind}_tokens"] for kind in MODALITIES)


def _picture_names(row: Row) -> Iterable[str]:
    yield from row["images"]
    for video in row["videos"]:
        yield from video["frames"]
