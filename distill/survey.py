"""One pass over a set before anything is trained: what is wrong with it, and what it holds.

Several processes share the items, and all know in the end what was found in any.

Items that show an equal picture or video have to be on one side of the split, and so do items
without any that say the same. Pictures are equal by size and pixels: a crop, another resolution or
a paraphrase is not found, nor a run of words that two texts share.

The generated default set is not read through, for drawing all of it would take long. Each of its
documents is drawn anew; passages of text are cut from the same books, so that verses of one that is
held out may stand in one that is trained on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvvl.calib_data.items import Item
from nvvl.calib_data.listing import DEFAULT
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.calib_data.media import picture_name
from nvvl.errors import DataError
from nvvl.model.processes import Processes
from nvvl.progress import Progress

STAGE = "looking through items"

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


def survey_set(
    items: CalibrationSet,
    check: Callable[[Item], None],
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Read every item of a set once.

    Args:
        items: The set.
        check: Raises DataError for an item that cannot be used.
        processes: Those that share the items; None for this one alone.
        progress: Called on the main process after each item.

    Raises:
        DataError: naming the first items that cannot be read or used, and how many there are.
        ReportedError: on other processes than the main one, in place of any error.
    """
    if items.spec == DEFAULT:
        return Survey((), None)
    seen = _look_through(items, range(len(items.items)), check, processes, progress)
    return Survey(_join(set(one["names"]) for one in seen), _hash(seen))


def hash_items(
    items: CalibrationSet,
    indices: Sequence[int],
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> str:
    """Return a SHA-256, in hex, of some items of a set with their names, in the order given.

    Args:
        items: The set.
        indices: Of the items.
        processes: As in `survey_set`.
        progress: As in `survey_set`.

    Raises:
        DataError: as `survey_set`.
        ReportedError: as `survey_set`.
    """
    return _hash(_look_through(items, indices, None, processes, progress))


def _look_through(
    items: CalibrationSet,
    indices: Sequence[int],
    check: Callable[[Item], None] | None,
    processes: Processes | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Read each item on one of the processes; return on all what `_look` says of each."""
    processes = processes or Processes("cpu", join=False)
    count, total = processes.count, len(indices)
    mine: list[dict[str, Any]] = []
    with processes.agreed():
        for index in indices[processes.index :: count]:
            mine.append(_look(items.items, index, check))
            if progress is not None and processes.is_main:
                progress(STAGE, min(len(mine) * count, total), total)  # as if all were as fast
    shares = processes.gather(mine)
    seen = [shares[place % count][place // count] for place in range(total)]
    with processes.agreed():
        _refuse_faults(items.spec, [one["fault"] for one in seen if "fault" in one], total)
    return seen


def _look(
    items: Sequence[Item], index: int, check: Callable[[Item], None] | None
) -> dict[str, Any]:
    """Return ``names`` of what an item has and its ``line`` of the hash, or its ``fault``."""
    try:
        item = items[index]
        if check is not None:
            check(item)
    except DataError as error:
        return {"fault": str(error)}
    shown = _shown(item)
    return {"names": shown or [_said(item)], "line": _describe(item, shown)}


def _refuse_faults(spec: str, faults: Sequence[str], num_items: int) -> None:
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        named = "\n".join(faults[:_MOST_FAULTS])
        more = len(faults) - _MOST_FAULTS
        named += f"\nand {more} more" if more > 0 else ""
        raise DataError(f"{spec}: {len(faults)} of {num_items} items cannot be used:\n{named}")


def _hash(seen: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for one in seen:
        # names of files that are no UTF-8 have half characters for bytes
        digest.update(one["line"].encode(errors="surrogateescape"))
    return digest.hexdigest()


def _describe(item: Item, shown: Sequence[str]) -> str:
    times = [(video.fps, list(video.frame_indices)) for video in item.videos]
    return f"{item.item_id} {_said(item)} {' '.join(shown)} {times}\n"


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
