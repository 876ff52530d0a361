"""Which items are held out: none whose picture, video or whole text is trained on too.

Items that show an equal picture or video are on one side of the split, and so are items without any
that say the same. Pictures are equal by size and pixels: a crop, another resolution or a paraphrase
is not found, nor a run of words that two texts share. Each item is read once for this.

The generated default set is split item by item, for drawing all of it would take long. Each of its
documents is drawn anew; passages of text are cut from the same books, so that verses of one that is
held out may stand in one that is trained on.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch

from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.listing import DEFAULT
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.calib_data.media import picture_name
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import DataError


def find_groups(items: CalibrationSet) -> list[list[int]]:
    """Return the indices of items that have to stay together, in groups of two and more.

    Raises:
        DataError: if an item cannot be read.
    """
    return [] if items.spec == DEFAULT else _join(map(_contents, items.items))


def split_items(
    num_items: int, recipe: DistillRecipe, *, seed: int, groups: Iterable[Sequence[int]] = ()
) -> tuple[list[int], list[int]]:
    """Return the indices of the items that are trained on, and of those that are held out.

    Args:
        num_items: Of the set.
        recipe: Says how many are held out; fewer are where groups leave a rest.
        seed: Of their order.
        groups: Items that stay together; without them items are split one by one.

    Raises:
        DataError: if every group is larger than what is to be held out.
    """
    together = {index: group for group in groups for index in group}
    held_out: set[int] = set()
    seen: set[int] = set()
    for index in permutation(num_items, seed, -1):
        group = together.get(index, (index,))
        room = recipe.num_validation_items - len(held_out)
        if index not in seen and len(group) <= room:
            held_out.update(group)
        seen.update(group)
    if not held_out:
        smallest = min(len(group) for group in together.values())
        raise DataError(
            f"validation: required up to {recipe.num_validation_items} items that share no picture "
            f"and no text with the others, got groups of {smallest} and more that do; give other "
            "items, or hold out more (num_validation_items)"
        )
    return [index for index in range(num_items) if index not in held_out], sorted(held_out)


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the items in an epoch; that of epoch -1 is the split's."""
    # torch's generator on the CPU gives the same permutation on every machine
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**31)
    return torch.randperm(size, generator=generator).tolist()


def _contents(item: Item) -> set[str]:
    """Return hashes of what an item shows, or of what it says if it shows nothing."""
    names = {picture_name(image) for image in item.images}
    for video in item.videos:
        frames = " ".join(map(picture_name, video.frames))
        names.add(hashlib.sha256(frames.encode()).hexdigest())
    return names or {item_hash(item)}


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
