"""Generated documents of text: one line anywhere on a tile, a tile full of lines, paragraphs."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from nvvl.calib_data.drawing import (
    MARGIN,
    MIN_SIZE,
    Canvas,
    Face,
    FontFile,
    Split,
    choose_font,
    choose_palette,
    fit_face,
    load_face,
)
from nvvl.calib_data.values import load_list
from nvvl.calib_data.words import Strings, belongs

TILE = 256
READ = "Read the text."
TRANSCRIBE = "Transcribe the document."
SCRAMBLED_SIZES = ((12, 16), (12, 16), (16, 32))  # px, least and most of a document's print

Turn = tuple[str, str]


@dataclass
class Drawn:
    """What a layout returns: drawn canvases, before wear, and questions with exact answers.

    Attributes:
        is_video: Canvases are frames of a video, not pages.
    """

    canvases: list[Canvas]
    turns: list[Turn] = field(default_factory=list)
    is_video: bool = False


@dataclass(frozen=True)
class Source:
    """What a layout draws from: the document's random generator, strings and fonts."""

    rng: random.Random
    strings: Strings
    fonts: Split

    def font(self, *kinds: str) -> FontFile:
        """Draw a font, of certain kinds if any are given."""
        return choose_font(self.rng, self.fonts, kinds=kinds)

    def fit(
        self, draw: Callable[[], str], limit: int, *, sizes: tuple[int, int]
    ) -> tuple[str, Face]:
        """Draw texts and fonts until one is at most ``limit`` pixels wide.

        Args:
            draw: Draws a text.
            limit: Most pixels.
            sizes: Least and most of the wanted size; the face is smaller where the text is long.
        """
        while True:
            text = draw()
            face = fit_face(self.font(), [text], limit, self.rng.randint(*sizes))
            if face is not None:
                return text, face

    def canvas(self, width: int = TILE, height: int = TILE) -> Canvas:
        """Start an image with colours of its own."""
        return Canvas((width, height), choose_palette(self.rng))


def draw_line(source: Source) -> Drawn:
    """Draw one line of text at a random place."""
    rng = source.rng
    canvas = source.canvas()
    text, face = source.fit(
        lambda: source.strings.line(4, 28), canvas.width - 2 * MARGIN, sizes=(13, 34)
    )
    length = face.width(text)
    x = rng.randint(MARGIN, canvas.width - MARGIN - length)
    y = rng.randint(MARGIN, canvas.height - MARGIN - face.height)
    _distract(canvas, rng, x, y, length, face)
    canvas.text(x, y + face.ascent, text, face)
    return Drawn([canvas], [(READ, text)])


def _distract(canvas: Canvas, rng: random.Random, x: int, y: int, length: int, face: Face) -> None:
    """Draw rules or boxes that are not text, clear of the line."""
    palette = canvas.palette
    around = (x - 5, y - 4, x + length + 4, y + face.height + 4)
    style = rng.random()
    if style < 0.15:
        canvas.rule(MARGIN, around[3], canvas.width - MARGIN)
    elif style < 0.3:
        canvas.box(around, fill=palette.faint, outline=palette.accent)
    elif style < 0.4:
        for _ in range(rng.randint(1, 4)):
            left, top = rng.randrange(canvas.width - 20), rng.randrange(canvas.height - 20)
            box = (left, top, left + rng.randint(8, 90), top + rng.randint(4, 60))
            if box[3] < around[1] or box[1] > around[3]:
                canvas.box(box, outline=palette.accent, fill=rng.choice((None, palette.faint)))


def draw_text(source: Source) -> Drawn:
    """Draw a paragraph of three to eight lines that fills a tile's width."""
    canvas = source.canvas()
    rng = source.rng
    lines, face = compose_paragraph(source, canvas.width - 2 * MARGIN, rng.randint(3, 8), 22)
    pitch = choose_pitch(rng, face.height, len(lines), canvas.height - 2 * MARGIN)
    y = rng.randint(MARGIN, canvas.height - MARGIN - pitch * (len(lines) - 1) - face.height)
    x = MARGIN + rng.randint(0, 4)
    for index, line in enumerate(lines):
        canvas.text(x, y + face.ascent + index * pitch, line, face)
    return Drawn([canvas], [(TRANSCRIBE, "\n".join(lines))])


def draw_lines(source: Source) -> Drawn:
    """Fill a tile with lines that have nothing to do with each other, each in a font of its own."""
    return _fill_tile(
        source,
        lambda: source.strings.line(4, 28),
        lambda: (13, source.rng.randint(14, 34)),
    )


def draw_scrambled_lines(source: Source) -> Drawn:
    """Fill a tile with strings that cannot be guessed, most often in small print."""
    return _fill_tile(
        source,
        lambda: source.strings.value("scrambled", 28),
        lambda: source.rng.choice(SCRAMBLED_SIZES),
    )


def _fill_tile(
    source: Source, draw: Callable[[], str], draw_sizes: Callable[[], tuple[int, int]]
) -> Drawn:
    """Draw lines from top to bottom, within the least and most of the wanted size."""
    rng = source.rng
    canvas = source.canvas()
    while True:
        lines = _compose_lines(source, canvas, draw, draw_sizes())
        text = "\n".join(line for line, _ in lines)
        if belongs(text, source.strings.split):
            break
    spare = canvas.height - 2 * MARGIN - sum(face.height for _, face in lines)
    y = MARGIN
    for line, face in lines:
        gap = rng.randint(0, spare)
        x = rng.randint(MARGIN, canvas.width - MARGIN - face.width(line))
        canvas.text(x, y + gap + face.ascent, line, face)
        y, spare = y + gap + face.height, spare - gap
    return Drawn([canvas], [(TRANSCRIBE, text)])


def _compose_lines(
    source: Source, canvas: Canvas, draw: Callable[[], str], sizes: tuple[int, int]
) -> list[tuple[str, Face]]:
    """Draw lines with their faces until the next is higher than what is left of the canvas."""
    lines: list[tuple[str, Face]] = []
    room = canvas.height - 2 * MARGIN
    while True:
        text, face = source.fit(draw, canvas.width - 2 * MARGIN, sizes=sizes)
        if lines and face.height > room:
            return lines
        lines.append((text, face))
        room -= face.height


def compose_paragraph(
    source: Source, width: int, num_lines: int, max_size: int
) -> tuple[list[str], Face]:
    """Break prose or random words into lines at most ``width`` pixels wide.

    Returns:
        The lines, of which each holds at least one word, and the face they were measured in.
    """
    width -= 4
    face = load_face(source.font().file, source.rng.randint(MIN_SIZE + 1, max_size))
    while True:
        words = _draw_words(source, num_lines)
        lines = break_lines(words, face, width)[:num_lines]
        if len(lines) == num_lines and belongs("\n".join(lines), source.strings.split):
            return lines, face


def _draw_words(source: Source, num_lines: int) -> list[str]:
    """Draw more than enough words for the lines: prose of the split, or a mixture."""
    rng = source.rng
    if rng.random() < 0.6:
        lines = load_list(f"prose_{source.strings.split}.txt")
        start = rng.randrange(len(lines) - num_lines - 1)
        words = " ".join(lines[start : start + num_lines + 2]).split()
        return words[rng.randrange(min(12, len(words) // 2)) :]
    return [rng.choice(load_list("words.txt")) for _ in range(num_lines * 9)]


def break_lines(words: list[str], face: Face, width: int) -> list[str]:
    """Break words greedily into lines; the last, unfinished line is dropped.

    A word wider than a line is left out.
    """
    space = face.width(" ")
    lines: list[str] = []
    line: list[str] = []
    used = 0
    for word in words:
        length = face.width(word)
        if length > width:
            continue
        if line and used + space + length > width:
            lines.append(" ".join(line))
            line, used = [], 0
        used += length + (space if line else 0)
        line.append(word)
    return lines


def choose_pitch(rng: random.Random, line_height: int, num_lines: int, height: int) -> int:
    """Draw a distance between lines, so that all of them fit ``height`` pixels."""
    if num_lines == 1:
        return line_height
    limit = (height - line_height) // (num_lines - 1)
    return min(round(line_height * rng.uniform(1.05, 1.6)) + 1, limit)


def text_passage(seed: int, split: Split) -> str:
    """Return a passage of 3 to 8 verses of prose, for items without images."""
    rng = random.Random(f"passage:{split}:{seed}")
    lines = load_list(f"prose_{split}.txt")
    count = rng.randint(3, 8)
    start = rng.randrange(len(lines) - count)
    return " ".join(lines[start : start + count])
