"""The training plan: what is learned, in which order, on which documents.

The order follows the full-size model in small: a vision tower that sees glyphs and a language model
that knows text come first (RADIO and the base model, there), then the projector with both frozen,
then everything on single tiles, then pages of several tiles and short videos, then longer contexts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

Part = Literal["vision", "glyph_head", "projector", "language"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        groups: share of batches drawn from each group of document kinds.
        parts: what trains; the rest is frozen.
        steps: optimizer steps.
        glyph_weight: weight of the dense glyph loss on vision features; with no language model
            trained beside it, it is the only loss.
        replays: how often a drawn batch is trained on again.
        start, end: learning rate at the first and last step, as a share of the peak rate.
    """

    name: str
    groups: dict[str, float]
    parts: tuple[Part, ...]
    steps: int
    glyph_weight: float
    replays: int = 0
    start: float = 1.0
    end: float = 1.0

    @property
    def answers(self) -> bool:
        """Whether answers are learned; else glyphs alone are."""
        return "projector" in self.parts or "language" in self.parts


GROUPS: dict[str, tuple[dict[str, float], int, int]] = {
    "single": (
        {"line": 0.2, "card": 0.36, "table": 0.12, "receipt": 0.1, "text": 0.12, "chart": 0.1},
        256,
        320,
    ),
    "two_pages": ({"two_pages": 1.0}, 160, 416),
    "page": ({"page": 1.0}, 64, 768),
    "video": ({"video": 1.0}, 48, 1120),
    "passage": ({"passage": 1.0}, 192, 320),
    "forms": ({"card": 0.5, "table": 0.25, "receipt": 0.25}, 256, 320),
    "dense": (
        {"lines": 0.6, "card": 0.15, "table": 0.1, "text": 0.1, "line": 0.05},
        256,
        320,
    ),
    "scrambled": ({"scrambled_card": 0.45, "scrambled_lines": 0.55}, 256, 320),
    "lone": ({"line": 1.0}, 256, 192),
}
"""Kinds of each group with their shares, rows of a batch, tokens of a row; a batch is one group."""

SINGLE = {"single": 0.94, "passage": 0.06}
MIXED = {"single": 0.6, "page": 0.16, "two_pages": 0.1, "video": 0.1, "passage": 0.04}
LONG = {"single": 0.45, "page": 0.25, "two_pages": 0.12, "video": 0.14, "passage": 0.04}
READING = {"dense": 0.5, "single": 0.44, "page": 0.02, "two_pages": 0.02, "video": 0.02}
LOOKUP = {
    "forms": 0.5,
    "dense": 0.15,
    "single": 0.15,
    "page": 0.08,
    "two_pages": 0.08,
    "video": 0.02,
    "passage": 0.02,
}

SMALL_PRINT = {
    "scrambled": 0.42,
    "lone": 0.18,
    "forms": 0.14,
    "dense": 0.1,
    "single": 0.08,
    "page": 0.03,
    "two_pages": 0.03,
    "video": 0.02,
}

LARGER_TILES = {
    "single": 0.34,
    "scrambled": 0.18,
    "forms": 0.16,
    "lone": 0.12,
    "dense": 0.04,
    "page": 0.06,
    "two_pages": 0.05,
    "video": 0.05,
}

EVERYTHING: tuple[Part, ...] = ("vision", "glyph_head", "projector", "language")


def _scaled(scale: float, steps: int) -> int:
    return max(2, round(scale * steps))


def _glyph_head(name: str, groups: dict[str, float], steps: int) -> Stage:
    """Return a stage that fits the glyph head, which no model keeps, to the tower as it is."""
    return Stage(name=name, groups=groups, parts=("glyph_head",), steps=steps, glyph_weight=1.0)


def _everything(
    name: str, groups: dict[str, float], steps: int, *, start: float, glyph_weight: float = 0.3
) -> Stage:
    """Return a stage that trains all parts of a trained model to the end of the rate."""
    return Stage(
        name=name,
        groups=groups,
        parts=EVERYTHING,
        steps=steps,
        glyph_weight=glyph_weight,
        start=start,
        end=0.0,
    )


def make_refinement(scale: float) -> list[Stage]:
    """Return the stages that let a trained model read better.

    Trained with all the rest, the vision tower forgets how to tell glyphs. It learns that again, to
    the end of its rate, on tiles full of text; then the projector and the language model learn to
    read from it as it is, then everything; last, the language model to find a value among others.
    Steps are meant for batches an eighth of those of `GROUPS`, a second or two of two CPU cores.
    """
    steps = partial(_scaled, scale)
    return [
        _glyph_head("glyph_head", {"dense": 1.0}, steps(120)),
        Stage(
            name="vision_again",
            groups={"dense": 1.0},
            parts=("vision", "glyph_head"),
            steps=steps(1400),
            glyph_weight=1.0,
            start=0.4,
            end=0.0,
        ),
        Stage(
            name="language_again",
            groups=READING,
            parts=("projector", "language"),
            steps=steps(1700),
            glyph_weight=0.0,
            start=0.4,
            end=0.2,
        ),
        _everything("everything_again", READING, steps(640), start=0.2),
        Stage(
            name="lookup_again",
            groups=LOOKUP,
            parts=("projector", "language"),
            steps=steps(1000),
            glyph_weight=0.0,
            start=0.3,
            end=0.0,
        ),
    ]


def make_small_print(scale: float) -> list[Stage]:
    """Return the stages that make a refined model read what it sees, not what it expects.

    Where print was small it answered from the names it knew. Strings that cannot be guessed, most
    of them small, teach the tower and the language model together; batches as `make_refinement`.
    """
    steps = partial(_scaled, scale)
    return [
        _glyph_head("small_glyph_head", {"scrambled": 0.5, "dense": 0.5}, steps(100)),
        _everything("small_print", SMALL_PRINT, steps(1150), start=0.3, glyph_weight=0.5),
    ]


def make_larger_tiles(scale: float) -> list[Stage]:
    """Return the stages that make a model of small print read the same pictures on larger tiles.

    The position table is interpolated to any grid of patches, so the weights read at once; what
    these steps teach, with tiles of 320 px, is print of sizes that smaller ones had not shown.
    """
    steps = partial(_scaled, scale)
    return [
        _glyph_head("larger_glyph_head", {"scrambled": 0.5, "dense": 0.5}, steps(100)),
        _everything("larger_tiles", LARGER_TILES, steps(1500), start=0.3),
    ]


def make_stages(scale: float) -> list[Stage]:
    """Return the stages, every number of steps multiplied by ``scale``."""
    steps = partial(_scaled, scale)
    return [
        Stage(
            name="vision",
            groups={"single": 1.0},
            parts=("vision", "glyph_head"),
            steps=steps(2000),
            glyph_weight=1.0,
            replays=2,
            end=0.5,
        ),
        Stage(
            name="text",
            groups={"passage": 1.0},
            parts=("language",),
            steps=steps(500),
            glyph_weight=0.0,
        ),
        Stage(
            name="projector",
            groups={"single": 1.0},
            parts=("projector",),
            steps=steps(108),
            glyph_weight=0.0,
            replays=1,
        ),
        Stage(
            name="documents",
            groups=SINGLE,
            parts=EVERYTHING,
            steps=steps(3240),
            glyph_weight=0.05,
            replays=1,
        ),
        Stage(
            name="pages_and_videos",
            groups=MIXED,
            parts=EVERYTHING,
            steps=steps(1840),
            glyph_weight=0.02,
            replays=1,
            end=0.4,
        ),
        Stage(
            name="long",
            groups=LONG,
            parts=EVERYTHING,
            steps=steps(1380),
            glyph_weight=0.02,
            replays=1,
            start=0.4,
            end=0.0,
        ),
    ]


PLANS: dict[str, Callable[[float], list[Stage]]] = {
    "whole": make_stages,
    "refine": make_refinement,
    "small_print": make_small_print,
    "larger_tiles": make_larger_tiles,
}
"""Stages of each plan, of which every later one starts from a model of the one before."""
