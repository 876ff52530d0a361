"""What a built set holds, in numbers: items, tokens by modality and domain, tiles an image."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvvl.calib_data.built import Row

if TYPE_CHECKING:
    from rich.table import Table

MODALITIES = ("text", "image", "video")

_COUNTED = (
    *("num_items", "num_images", "num_videos"),
    *("text_tokens", "image_tokens", "video_tokens", "answer_tokens"),
)


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


def summary_tables(manifest: Mapping[str, Any]) -> list["Table"]:
    """Lay out the manifest of a built set: domains, tiles, sources."""
    from rich.table import Table

    summary = manifest["summary"]
    heads = ("items", "images", "videos", *(f"{kind} tokens" for kind in MODALITIES), "answers")
    domains = Table("domain", title=str(manifest["name"]), title_justify="left")
    for head in heads:
        domains.add_column(head, justify="right")
    for name, counts in (*summary["domains"].items(), ("all", summary)):
        domains.add_row(name, *(f"{counts[key]:,}" for key in _COUNTED))
    tiles = Table("tiles of an image", *summary["images_by_tiles"])
    tiles.add_row("images", *(f"{count:,}" for count in summary["images_by_tiles"].values()))
    sources = Table("source", "kind", "items", "bad", "too long", "twice", "overlaps")
    overlaps = [row["item_id"].split("/")[0] for row in manifest["overlap"]["found"]]
    for row in manifest["sources"]:
        left_out = (len(row[key]) for key in ("bad", "too_long", "duplicates"))
        numbers = (row["num_items"], *left_out, overlaps.count(row["name"]))
        sources.add_row(*map(str, (row["name"], row["kind"], *numbers)))
    return [domains, *([tiles] if summary["images_by_tiles"] else []), sources]
