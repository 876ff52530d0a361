"""One pass over a set before anything is trained: what is wrong with it, and what it holds.

Items that show an equal picture or video have to be on one side of the split, and so do items
without any that say the same. Pictures are equal by size and pixels: a crop, another resolution or
a paraphrase is not found, nor a run of words that two texts share.

The generated default set is not read through, for drawing all of it would take long. Each of its
documents is drawn anew; passages of text are cut from the same books, so that verses of one that is
held out may stand in one that is trained on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nvvl.calib_data.items import Item
from nvvl.calib_data.listing import DEFAULT
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.calib_data.media import picture_name
from nvvl.errors import DataError

_MOST_FAULTS = 5


@dataclass(frozen=True)
class Survey:
    """What a set holds.

    Attributes:
        groups: Indices of items that have to stay together, in groups of two and more.
        sha256: Of all items in their order, in hex; None of the default set.
    """

    groups: Sequence[Sequence[int]]
    sha256: str | None


def survey_set(items: CalibrationSet, check: Callable[[Item], None]) -> Survey:
    """Read every item of a set once.

    Args:
        items: The set.
        check: Raises DataError for an item that cannot be used.

    Raises:
        DataError: naming the first items that cannot be read or used, and how many there are.
    """
    if items.spec == DEFAULT:
        return Survey((), None)
    contents: list[set[str]] = []
    digest = hashlib.sha256()
    faults: list[str] = []
    for index in range(len(items.items)):
        try:
            item = items.items[index]
            check(item)
        except DataError as error:
            faults.append(str(error))
            continue
        shown = _shown(item)
        contents.append(set(shown) or {_said(item)})
        digest.update(_describe(item, shown))
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        named = "\n".join(faults[:_MOST_FAULTS])
        more = len(faults) - _MOST_FAULTS
        named += f"\nand {more} more" if more > 0 else ""
        raise DataError(
            f"{items.spec}: {len(faults)} of {len(items.items)} items cannot be used:\n{named}"
        )
    return Survey(_join(contents), digest.hexdigest())


def hash_items(items: Iterable[Item]) -> str:
    """Return a SHA-256, in hex, of items with their names, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(_describe(item, _shown(item)))
    return digest.hexdigest()


def _describe(item: Item, shown: Sequence[str]) -> bytes:
    times = [(video.fps, list(video.frame_indices)) for video in item.videos]
    # names of files that are no UTF-8 have half characters for bytes
    line = f"{item.item_id} {_said(item)} {' '.join(shown)} {times}\n"
    return line.encode(errors="surrogateescape")


def _said(item: Item) -> str:
    """Return a hash of the turns."""
    turns = [(message.role, message.content) for message in item.messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _shown(item: Item) -> list[str]:
    """Return hashes of the pictures, then of the frames of each video."""
    names = [picture_name(image) for image in item.images]
    for video in item.videos:
        frames = " ".join(map(picture_name, video.frames))
        names.append(hashlib.sha256(frames.encode()).hexdigest())
    return names


def _join(contents: Iterable[set[str]]) -> list[list[int]]:
    """Return groups of two and more that have something in common, if only over others."""
    first: dict[str, int] = {}
    parents: list[int] = []

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for index, names in enumerate(contents):
        parents.append(index)
        for name in names:
            parents[root(index)] = root(first.setdefault(name, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(parents)):
        groups.setdefault(root(index), []).append(index)
    return [group for group in groups.values() if len(group) > 1]
