"""Text on images, with the place of every glyph: the ground of all generated documents.

A document must come out the same on every machine, so nothing depends on installed fonts or on
text shaping libraries: the fonts are the ASCII subsets beside this file and Pillow's basic layout
draws them. They carry no kerning, hence the width of a text is the sum of whole-pixel advances;
`Face` tabulates those, and draws each glyph once per font and size, so that fitting a text is a
sum and drawing it a series of stamps. (All fonts at all sizes take some 200 MB in the end.)
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "held_out"]
Color = tuple[int, int, int]

FONTS = Path(__file__).parent / "fonts"
MARGIN = 8  # px kept free at each edge: room for a rotation of 1.5 degrees of a 512 px page
MIN_SIZE = 12  # px; smaller text is not legible in every one of the fonts

_EXTENT_SAMPLE = "|(){}[]@Agjpqy$"  # reaches the highest and lowest ink of ASCII
_ESTIMATE_SIZE = 256  # px at which unrounded widths are tabulated


class Glyph(NamedTuple):
    """One drawn character, the pixels it covers (without ``x1`` and ``y1``), and its font size."""

    char: str
    x0: int
    y0: int
    x1: int
    y1: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the pixels."""
        return self.x0, self.y0, self.x1, self.y1


@dataclass(frozen=True)
class FontFile:
    """One bundled font.

    Attributes:
        kind: ``sans``, ``serif``, ``mono`` or ``condensed``.
        split: Families of ``held_out`` never occur in training documents.
    """

    file: str
    family: str
    style: str
    kind: str
    split: Split


@cache
def list_fonts(split: Split) -> dict[str, tuple[FontFile, ...]]:
    """Return the bundled fonts of one split, by family."""
    rows = json.loads((FONTS / "index.json").read_text(encoding="utf-8"))
    families: dict[str, list[FontFile]] = {}
    for row in rows:
        if row["split"] == split:
            families.setdefault(row["family"], []).append(FontFile(**row))
    return {family: tuple(files) for family, files in sorted(families.items())}


class _Stamp(NamedTuple):
    """A character drawn once: its opacity, and where its corner lies from the pen."""

    opacity: Image.Image
    left: int
    top: int


class _Advances(dict[str, int]):
    """Advance of each character in pixels, measured when first asked for."""

    def __init__(self, font: ImageFont.FreeTypeFont) -> None:
        super().__init__()
        self._font = font

    def __missing__(self, char: str) -> int:
        self[char] = advance = round(self._font.getlength(char))
        return advance


class _Stamps(dict[str, _Stamp]):
    """Stamp of each character, drawn when first asked for."""

    def __init__(self, font: ImageFont.FreeTypeFont) -> None:
        super().__init__()
        self._font = font

    def __missing__(self, char: str) -> _Stamp:
        left, top, right, bottom = map(round, self._font.getbbox(char, anchor="ls"))
        opacity = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(opacity).text((-left, -top), char, font=self._font, fill=255, anchor="ls")
        self[char] = stamp = _Stamp(opacity, left, top)
        return stamp


class Face:
    """A font at one size. Widths are tabulated and glyphs drawn once, for speed.

    Attributes:
        ascent: Pixels of ink above the baseline, over all characters.
        descent: Pixels of ink below the baseline, over all characters.
        advances: Character to its advance in pixels.
        stamps: Character to its image.
    """

    def __init__(self, file: str, size: int) -> None:
        self.size = size
        font = ImageFont.truetype(str(FONTS / file), size, layout_engine=ImageFont.Layout.BASIC)
        box = font.getbbox(_EXTENT_SAMPLE, anchor="ls")
        self.ascent = round(-box[1])
        self.descent = round(box[3])
        self.advances = _Advances(font)
        self.stamps = _Stamps(font)

    @property
    def height(self) -> int:
        """Pixels from the highest to the lowest ink."""
        return self.ascent + self.descent

    def width(self, text: str) -> int:
        """Return the advance width of a text in pixels."""
        return sum(map(self.advances.__getitem__, text))


@cache
def load_face(file: str, size: int) -> Face:
    """Return a bundled font at a size in pixels; loaded once."""
    return Face(file, size)


def choose_font(rng: random.Random, fonts: Split, *, kinds: Sequence[str] = ()) -> FontFile:
    """Draw a family, then one of its styles, so that many styles do not outweigh a family."""
    families = [
        files for files in list_fonts(fonts).values() if not kinds or files[0].kind in kinds
    ]
    return rng.choice(rng.choice(families))


def choose_style(rng: random.Random, font: FontFile) -> FontFile:
    """Draw a style of the same family, possibly the same one."""
    return rng.choice(list_fonts(font.split)[font.family])


def fit_size(width_at: Callable[[int], int], limit: int, size: int) -> int | None:
    """Find the largest font size, at most ``size``, whose width is at most ``limit`` pixels.

    Args:
        width_at: Gives the width in pixels at a font size; proportional to it but for rounding.
        limit: Most pixels.
        size: Largest font size.

    Returns:
        The size, or None if even `MIN_SIZE` is too wide.
    """
    # rounding of advances can go either way: start one above the estimate and step down
    estimate = limit * _ESTIMATE_SIZE // max(width_at(_ESTIMATE_SIZE), 1) + 1
    for candidate in range(min(size, estimate), MIN_SIZE - 1, -1):
        if width_at(candidate) <= limit:
            return candidate
    return None


def fit_face(font: FontFile, texts: Sequence[str], limit: int, size: int) -> Face | None:
    """Find the largest face, at most ``size``, in which no text is wider than ``limit``."""
    fitting = fit_size(lambda at: widest(load_face(font.file, at), texts), limit, size)
    return None if fitting is None else load_face(font.file, fitting)


def widest(face: Face, texts: Sequence[str]) -> int:
    """Return the width of the widest text in pixels."""
    return max(face.width(text) for text in texts)


@dataclass(frozen=True)
class Palette:
    """Colours of one document; ink and background differ enough to read."""

    background: Color
    ink: Color
    accent: Color
    faint: Color


def choose_palette(rng: random.Random) -> Palette:
    """Draw dark on light (most often) or light on dark, sometimes of low contrast."""
    low_contrast = rng.random() < 0.12
    light = rng.randint(205, 255)
    dark = rng.randint(95, 115) if low_contrast else rng.randint(0, 70)
    paper, ink = _tint(rng, light, 14), _tint(rng, dark, 30)
    accent = _tint(rng, min(dark + 20, 110), 60)
    if rng.random() < 0.2:
        paper, ink = ink, paper
        accent = _tint(rng, max(light - 20, 190), 40)
    return Palette(paper, ink, accent, mix(paper, ink, 0.12))


def _tint(rng: random.Random, level: int, spread: int) -> Color:
    red, green, blue = (
        max(0, min(255, level + rng.randint(-spread // 2, spread // 2))) for _ in range(3)
    )
    return red, green, blue


def mix(first: Color, second: Color, share: float) -> Color:
    """Return ``first`` with a share (0..1) of ``second`` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


class Canvas:
    """An image being drawn, and the glyphs on it."""

    def __init__(self, size: tuple[int, int], palette: Palette) -> None:
        self.palette = palette
        self.image = Image.new("RGB", size, palette.background)
        self.draw = ImageDraw.Draw(self.image)
        self.glyphs: list[Glyph] = []

    @property
    def width(self) -> int:
        """Width of the image in pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """Height of the image in pixels."""
        return self.image.height

    def text(self, x: int, baseline: int, text: str, face: Face, color: Color | None = None) -> int:
        """Draw one line of text and return the x behind it."""
        fill = color or self.palette.ink
        for char in text:
            if char != " ":
                opacity, left, top = face.stamps[char]
                corner = x + left, baseline + top
                self.draw.bitmap(corner, opacity, fill=fill)
                end = corner[0] + opacity.width, corner[1] + opacity.height
                self.glyphs.append(Glyph(char, *corner, *end, face.size))
            x += face.advances[char]
        return x

    def text_right(
        self, x: int, baseline: int, text: str, face: Face, color: Color | None = None
    ) -> int:
        """Draw one line of text that ends at ``x``, and return where it begins."""
        start = x - face.width(text)
        self.text(start, baseline, text, face, color)
        return start

    def rule(self, x0: int, y: int, x1: int, color: Color | None = None, width: int = 1) -> None:
        """Draw a horizontal line."""
        self.draw.line((x0, y, x1, y), fill=color or self.palette.accent, width=width)

    def box(
        self,
        corners: tuple[int, int, int, int],
        *,
        fill: Color | None = None,
        outline: Color | None = None,
    ) -> None:
        """Draw a rectangle."""
        self.draw.rectangle(corners, fill=fill, outline=outline)
