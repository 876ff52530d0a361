"""Which items are held out: none whose picture, video or whole text is trained on too.

What has to stay together is found by `nvvl.distill.survey`.
"""

from collections.abc import Iterable, Sequence

import torch

from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import DataError


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
