"""The training plan: what is learned, in which order, on which documents.

The order follows the full-size model in small: a vision tower that sees glyphs and a language model
that knows text come first (RADIO and the base model, there), then the projector with both frozen,
then everything on single tiles, then pages of several tiles and short videos, then longer contexts.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["vision", "projector", "language"]


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


GROUPS: dict[str, tuple[dict[str, float], int, int]] = {
    "single": (
        {"line": 0.2, "card": 0.36, "table": 0.12, "receipt": 0.1, "text": 0.12, "chart": 0.1},
        256,
        256,
    ),
    "two_pages": ({"two_pages": 1.0}, 160, 320),
    "page": ({"page": 1.0}, 64, 576),
    "video": ({"video": 1.0}, 48, 832),
    "passage": ({"passage": 1.0}, 192, 320),
}
"""Kinds of each group with their shares, rows of a batch, tokens of a row; a batch is one group."""

SINGLE = {"single": 0.94, "passage": 0.06}
MIXED = {"single": 0.6, "page": 0.16, "two_pages": 0.1, "video": 0.1, "passage": 0.04}
LONG = {"single": 0.45, "page": 0.25, "two_pages": 0.12, "video": 0.14, "passage": 0.04}


POLISH = {"single": 0.86, "page": 0.04, "two_pages": 0.04, "video": 0.03, "passage": 0.03}


def make_polish(steps: int) -> Stage:
    """Return the stage that trains a finished model further: everything, at a falling rate."""
    return Stage(
        name="polish",
        groups=POLISH,
        parts=("vision", "projector", "language"),
        steps=steps,
        glyph_weight=0.0,
        start=0.25,
        end=0.0,
    )


def make_stages(scale: float) -> list[Stage]:
    """Return the stages, every number of steps multiplied by ``scale``."""

    def steps(number: int) -> int:
        return max(2, round(number * scale))

    everything: tuple[Part, ...] = ("vision", "projector", "language")
    return [
        Stage(
            name="vision",
            groups={"single": 1.0},
            parts=("vision",),
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
            parts=everything,
            steps=steps(3240),
            glyph_weight=0.05,
            replays=1,
        ),
        Stage(
            name="pages_and_videos",
            groups=MIXED,
            parts=everything,
            steps=steps(1840),
            glyph_weight=0.02,
            replays=1,
            end=0.4,
        ),
        Stage(
            name="long",
            groups=LONG,
            parts=everything,
            steps=steps(1380),
            glyph_weight=0.02,
            replays=1,
            start=0.4,
            end=0.0,
        ),
    ]
