"""Text to be continued: held-out prose, of which each word is to be predicted at most once.

Perplexity is measured on the targets alone; the words before them are context and are the target of
other items. Targets of different items share no word, so that their likelihoods can be resampled
as items. A seed only changes the order.
"""

import random
from functools import cache

from nvvl.calib_data.items import Item
from nvvl.calib_data.sources import CONTINUE, PASSAGE
from nvvl.calib_data.values import load_list
from nvvl.errors import DataError
from nvvl.model.prompt import Message

_CONTEXT_WORDS = 40
_TARGET_WORDS = 9


def num_continuations() -> int:
    """Return how many items the held-out prose gives."""
    return (len(_words()) - _CONTEXT_WORDS) // _TARGET_WORDS


def make_continuation(index: int, seed: int) -> Item:
    """Make an item: words of prose, and the words that follow them there.

    Raises:
        DataError: if there are not that many items.
    """
    num_items = num_continuations()
    if not 0 <= index < num_items:
        raise DataError(f"continuation: has {num_items} items, asked for number {index}")
    start = _CONTEXT_WORDS + _TARGET_WORDS * _order(num_items, seed)[index]
    context = " ".join(_words()[start - _CONTEXT_WORDS : start])
    target = " ".join(_words()[start : start + _TARGET_WORDS])
    return Item(
        item_id=f"continuation-{seed}-{index}",
        messages=(Message("user", f"{CONTINUE}\n{context}"), Message("assistant", target)),
        domain=PASSAGE,
    )


@cache
def _words() -> tuple[str, ...]:
    return tuple(" ".join(load_list("prose_held_out.txt")).split())


@cache
def _order(num_items: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(f"continuation:{seed}").sample(range(num_items), num_items))
