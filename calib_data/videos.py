"""Generated videos: tiles on which some text stands still and some changes from frame to frame.

Frames are half a second apart, the rate at which the model samples videos, so frame ``i`` is shown
at ``i / 2`` seconds. A clock, a counter, a code or a word changes, now and then staying for a
frame or two; a title stays throughout; a box may move.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from nvvl.calib_data.drawing import MARGIN, Canvas, Face, Palette, fit_face
from nvvl.calib_data.texts import TILE, Drawn, Source, Turn

FPS = 2.0
TOP = "What is written at the top?"
BOTTOM = "What is written at the bottom?"

_SUBJECTS = ("clock", "counter", "code", "word")
_BOX = 22  # px, side of the moving box


def ask_at(subject: str, frame: int) -> str:
    """Return the question for what a changing text shows in a frame."""
    return f"What does the {subject} show at {frame / FPS:.1f} seconds?"


@dataclass(frozen=True)
class _Text:
    """A text at a place; ``y`` is where its tallest ink begins."""

    face: Face
    x: int
    y: int

    def draw(self, canvas: Canvas, text: str) -> None:
        canvas.text(self.x, self.y + self.face.ascent, text, self.face)


def draw_video(source: Source) -> Drawn:
    """Draw four to eight frames with a title and a changing text."""
    rng = source.rng
    palette = source.canvas().palette
    subject = rng.choice(_SUBJECTS)
    shown = _compose_changes(source, subject, rng.randint(4, 8))
    title, heading = _place_title(source)
    at_top = heading.y < TILE // 2
    free = (heading.y + heading.face.height + 8, TILE - MARGIN)
    if not at_top:
        free = (MARGIN, heading.y - 8)
    label = f"{subject.capitalize()}: "
    body = _place(source, [label + text for text in shown], (free[0], free[1] - _BOX - 10))
    path = _walk(rng, len(shown), free[1] - _BOX) if rng.random() < 0.6 else []
    canvases = []
    for index, text in enumerate(shown):
        canvas = Canvas((TILE, TILE), palette)
        heading.draw(canvas, title)
        body.draw(canvas, label + text)
        if path:
            _draw_box(canvas, palette, path[index])
        canvases.append(canvas)
    turns: list[Turn] = [
        (ask_at(subject, frame), shown[frame]) for frame in rng.sample(range(len(shown)), 3)
    ]
    turns.append((TOP if at_top else BOTTOM, title))
    rng.shuffle(turns)
    return Drawn(canvases, turns, is_video=True)


def _place_title(source: Source) -> tuple[str, _Text]:
    rng = source.rng
    title, face = source.fit(lambda: source.strings.title(20), TILE - 2 * MARGIN, sizes=(16, 26))
    x = rng.randint(MARGIN, TILE - MARGIN - face.width(title))
    at_top = rng.random() < 0.7
    return title, _Text(face, x, MARGIN if at_top else TILE - MARGIN - face.height)


def _place(source: Source, texts: list[str], band: tuple[int, int]) -> _Text:
    """Choose a face in which all texts fit, and a place for them between two heights."""
    rng = source.rng
    face = None
    while face is None:
        face = fit_face(source.font(), texts, TILE - 2 * MARGIN, rng.randint(16, 32))
    longest = max(face.width(text) for text in texts)
    return _Text(
        face,
        rng.randint(MARGIN, TILE - MARGIN - longest),
        rng.randint(band[0], band[1] - face.height),
    )


def _compose_changes(source: Source, subject: str, count: int) -> list[str]:
    """Draw the changing text of each frame; clock and counter go up."""
    rng, strings = source.rng, source.strings

    def clock() -> str:
        seconds = rng.randrange(86_400)
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    draws: dict[str, Callable[[], str]] = {
        "clock": lambda: strings.keep(clock),
        "counter": lambda: strings.keep(lambda: f"{rng.randrange(10_000):04d}"),
        "code": lambda: strings.value("code", 9),
        "word": lambda: strings.label(11),
    }
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[draws[subject]()] = None
    shown = list(texts)
    if subject in ("clock", "counter"):
        shown.sort()
    return [shown[index - (index > 0 and rng.random() < 0.25)] for index in range(count)]


def _walk(rng: random.Random, count: int, y: int) -> list[tuple[int, int]]:
    """Return the box's corner in each frame: a straight way at one speed."""
    start, end = (rng.randint(MARGIN, TILE - MARGIN - _BOX) for _ in range(2))
    return [(start + (end - start) * index // (count - 1), y) for index in range(count)]


def _draw_box(canvas: Canvas, palette: Palette, corner: tuple[int, int]) -> None:
    x, y = corner
    canvas.box((x, y, x + _BOX - 1, y + _BOX - 1), fill=palette.accent)
