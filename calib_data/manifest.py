"""Calibration sets: items that are made when used, and the record of what they were."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.listing import DEFAULT, list_items
from nvvl.calib_data.sources import ItemSource


class LazyItems(Sequence[Item]):
    """Items that are drawn or read anew at each access, so that a set takes no memory."""

    def __init__(self, sources: Sequence[ItemSource]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyItems": ...
    def __getitem__(self, index: int | slice) -> "Item | LazyItems":
        if isinstance(index, slice):
            return LazyItems(self._sources[index])
        return self._sources[index].load()

    def __iter__(self) -> Iterator[Item]:
        return (source.load() for source in self._sources)


@dataclass(frozen=True)
class CalibrationSet:
    """The items of a calibration set.

    Attributes:
        spec: What the set was made from: ``default``, or the path of a folder or JSONL file.
        num_requested: How many items were asked for; a user's files may be fewer.
    """

    items: Sequence[Item]
    spec: str
    num_requested: int

    @property
    def files(self) -> list[Path]:
        """The folder or file that the set was made from, in a list; none if it is generated."""
        path = Path(self.spec)
        return [path] if self.spec != DEFAULT and path.exists() else []

    @cached_property
    def manifest(self) -> list[dict[str, str]]:
        """``{"id", "sha256"}`` of each item; the first use makes every item."""
        return [{"id": item.item_id, "sha256": item_hash(item)} for item in self.items]


def load_calibration_set(
    spec: str | Path | None = None, *, num_items: int, seed: int = 0
) -> CalibrationSet:
    """Return a calibration set whose items are read or drawn when they are used.

    Args:
        spec: None or ``default`` for the generated mixture of documents and text, else a set that
            ``nvvl calib build`` made, a folder of images (asked to be described, or described by
            one JSONL file in it) or a ``.jsonl`` file.
        num_items: How many items to take; a user's files are all taken if they are fewer.
        seed: Which documents are generated, or which of the user's items are taken.

    Raises:
        DataError: as `nvvl.calib_data.listing.list_items`; an unreadable image or video raises it
            when its item is used.
    """
    spec = DEFAULT if spec is None else spec
    sources = list_items(spec, num_items=num_items, seed=seed)
    return CalibrationSet(LazyItems(sources), str(spec), num_items)
