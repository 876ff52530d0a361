"""Strings of generated documents, and which split each belongs to.

A string belongs to ``held_out`` if the first byte of its SHA-1 is a multiple of 16, else to
``train``: one string in sixteen, decided by the string alone. Every answer of a document is drawn
until it belongs to the document's split, so no held-out answer was ever an answer in training.
"""

import hashlib
import random
from collections.abc import Callable
from functools import cache

from nvvl.calib_data.drawing import Split
from nvvl.calib_data.values import DRAWS, draw_mixed, draw_number, draw_word, load_list


def belongs(text: str, split: Split) -> bool:
    """Tell whether a string is of a split; each string is of exactly one."""
    held_out = hashlib.sha1(text.encode()).digest()[0] % 16 == 0
    return held_out == (split == "held_out")


@cache
def load_fields() -> tuple[tuple[str, str], ...]:
    """Return field names of forms, each with the kind of value it takes."""
    rows = (line.split("\t") for line in load_list("fields.tsv"))
    return tuple((key, kind) for key, kind in rows)


class Strings:
    """Draws strings of one split from a random generator."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split: Split = split

    def keep(self, draw: Callable[[], str]) -> str:
        """Draw until a string belongs to the split."""
        while True:
            text = draw()
            if belongs(text, self.split):
                return text

    def value(self, kind: str, max_chars: int) -> str:
        """Draw a value of a kind such as ``money``, at most ``max_chars`` long.

        Kinds whose strings are all longer fall back to a number.
        """
        draw = DRAWS[kind]
        for _ in range(400):
            text = draw(self.rng)
            if len(text) <= max_chars and belongs(text, self.split):
                return text
        return self.keep(lambda: draw_number(self.rng))

    def line(self, min_chars: int, max_chars: int) -> str:
        """Draw a line of mixed content."""
        while True:
            text = draw_mixed(self.rng)
            if min_chars <= len(text) <= max_chars and belongs(text, self.split):
                return text

    def label(self, max_chars: int) -> str:
        """Draw one capitalized word."""
        while True:
            text = draw_word(self.rng).capitalize()
            if 3 <= len(text) <= max_chars and belongs(text, self.split):
                return text

    def labels(self, count: int, max_chars: int) -> list[str]:
        """Draw different capitalized words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.label(max_chars)] = None
        return list(found)

    def title(self, max_chars: int) -> str:
        """Draw a title of one to three words."""
        while True:
            words = [draw_word(self.rng) for _ in range(self.rng.randint(1, 3))]
            text = " ".join(words)
            text = text.upper() if self.rng.random() < 0.4 else text.title()
            if 4 <= len(text) <= max_chars and belongs(text, self.split):
                return text

    def fields(self, count: int) -> list[tuple[str, str]]:
        """Draw different field names with their kinds of values."""
        return self.rng.sample(load_fields(), count)
