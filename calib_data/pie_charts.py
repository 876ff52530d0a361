"""Generated pie and ring charts: shares printed in the sectors, or in a legend.

No model of this project was trained on them, so they stand for layouts that a model never saw.
"""

from dataclasses import dataclass

from nvvl.calib_data.charts import COLORS, choose_face
from nvvl.calib_data.drawing import Canvas, Color, Face, mix, widest
from nvvl.calib_data.forms import TITLE, Area, draw_title, inside
from nvvl.calib_data.marks import Marks, Point, on_circle
from nvvl.calib_data.texts import TILE, Drawn, Source, Turn
from nvvl.calib_data.words import belongs

LARGEST = "Which slice is the largest?"
SMALLEST = "Which slice is the smallest?"

_LEAST = 60  # tenths of a percent
_LEAST_WITH_TEXT = 150  # a sector that holds its own share
_SWATCH = 10  # px
_INSIDE_WIDTH = 38  # px of a share inside a sector


@dataclass(frozen=True)
class Slices:
    """Labels and their shares in tenths of a percent, 1,000 in all."""

    labels: list[str]
    tenths: list[int]

    @property
    def shares(self) -> list[str]:
        """The shares as they are printed."""
        return [_percent(tenths) for tenths in self.tenths]


def ask_share(label: str) -> str:
    """Return the question for a slice's share."""
    return f"What is the share of {label}?"


def draw_pie_chart(source: Source) -> Drawn:
    """Draw three to six slices, with the legend below, or beside on a wide page."""
    rng = source.rng
    wide = rng.random() < 0.3
    canvas = source.canvas(2 * TILE if wide else TILE, TILE)
    left, top, right, bottom = inside(canvas)
    turns: list[Turn] = []
    if rng.random() < 0.6:
        title, top = draw_title(source, canvas, (left, top, right, bottom), max_size=20)
        turns.append((TITLE, title))
    texts_inside = rng.random() < 0.35
    count = rng.randint(3, 4) if texts_inside else rng.randint(3, 6)
    slices = _compose(source, count, _LEAST_WITH_TEXT if texts_inside else _LEAST)
    area = (left, top + 2, right, bottom)
    draw = _draw_beside if wide else _draw_below
    draw(source, canvas, area, slices, texts_inside=texts_inside)
    asked = [
        (ask_share(label), share)
        for label, share in zip(slices.labels, slices.shares, strict=True)
        if belongs(share, source.strings.split)
    ]
    turns += rng.sample(asked, 2)
    pick, question = (max, LARGEST) if rng.random() < 0.7 else (min, SMALLEST)
    turns.append((question, slices.labels[slices.tenths.index(pick(slices.tenths))]))
    return Drawn([canvas], turns)


def _percent(tenths: int) -> str:
    return f"{tenths // 10}.{tenths % 10}%"


def _compose(source: Source, count: int, least: int) -> Slices:
    """Draw different shares; all are of the split but one, which is what the others leave."""
    rng = source.rng

    def draw() -> str:
        return _percent(rng.randint(least, 2000 // count))

    while True:
        kept = {source.strings.keep(draw) for _ in range(count - 1)}
        tenths = [int(share.rstrip("%").replace(".", "")) for share in sorted(kept)]
        tenths.append(1000 - sum(tenths))
        if len(set(tenths)) == count and tenths[-1] >= least:
            rng.shuffle(tenths)
            return Slices(source.strings.labels(count, 9), tenths)


def _draw_below(
    source: Source, canvas: Canvas, area: Area, slices: Slices, *, texts_inside: bool
) -> None:
    """Draw the circle, and the legend below it."""
    rng = source.rng
    left, top, right, bottom = area
    face = _choose_face(source, slices, right - left - 40, texts_inside)
    pitch = face.height + rng.randint(2, 4)
    legend = bottom - pitch * len(slices.labels)
    radius = min((legend - 6 - top) // 2, 80)
    center = rng.randint(left + radius, right - radius), top + radius
    colors = _draw_circle(source, canvas, center, radius, slices, face if texts_inside else None)
    spare = right - left - _legend_width(face, slices, texts_inside)
    place = left + rng.randint(0, spare), legend, pitch
    _draw_legend(source, canvas, place, slices, face, colors, texts_inside=texts_inside)


def _draw_beside(
    source: Source, canvas: Canvas, area: Area, slices: Slices, *, texts_inside: bool
) -> None:
    """Draw the circle on one half, and the legend on the other."""
    rng = source.rng
    left, top, right, bottom = area
    middle = (left + right) // 2
    face = _choose_face(source, slices, middle - left - 40, texts_inside)
    pitch = min(face.height + rng.randint(3, 12), (bottom - top) // len(slices.labels))
    radius = (bottom - top) // 2 - rng.randint(0, 12)
    on_left = rng.random() < 0.5
    center = (left + right + (middle - right if on_left else right - middle)) // 2, top + radius
    colors = _draw_circle(source, canvas, center, radius, slices, face if texts_inside else None)
    y = top + rng.randint(0, bottom - top - pitch * len(slices.labels))
    place = (middle + 8 if on_left else left), y, pitch
    _draw_legend(source, canvas, place, slices, face, colors, texts_inside=texts_inside)


def _choose_face(source: Source, slices: Slices, limit: int, texts_inside: bool) -> Face:
    size = source.rng.randint(12, 15)
    if texts_inside:
        return choose_face(source, slices.shares, _INSIDE_WIDTH, size)
    rows = [f"{label}: {share}" for label, share in zip(slices.labels, slices.shares, strict=True)]
    return choose_face(source, rows, limit, size)


def _legend_width(face: Face, slices: Slices, texts_inside: bool) -> int:
    width = _SWATCH + 6 + widest(face, slices.labels)
    return width if texts_inside else width + face.width(": ") + widest(face, slices.shares)


def _draw_circle(
    source: Source,
    canvas: Canvas,
    center: Point,
    radius: int,
    slices: Slices,
    face: Face | None,
) -> list[Color]:
    """Draw the sectors, each with its share in it if a face is given; return their colours."""
    rng = source.rng
    colors = [
        mix(color, canvas.palette.ink, 0.1) for color in rng.sample(COLORS, len(slices.labels))
    ]
    ring = radius * rng.uniform(0.35, 0.6) if face is None and rng.random() < 0.3 else None
    edge = canvas.palette.background if rng.random() < 0.6 else canvas.palette.ink
    start = rng.uniform(0, 360)
    marks = Marks(canvas)
    middles: list[float] = []
    for tenths, color in zip(slices.tenths, colors, strict=True):
        end = start + 0.36 * tenths
        marks.sector(center, radius, (start, end), color, edge=edge, ring=ring)
        middles.append((start + end) / 2)
        start = end
    marks.draw()
    if face is not None:
        for share, middle, color in zip(slices.shares, middles, colors, strict=True):
            x, y = on_circle(center, 0.62 * radius, middle)
            baseline = round(y) + (face.ascent - face.descent) // 2
            canvas.text(round(x) - face.width(share) // 2, baseline, share, face, _contrast(color))
    return colors


def _contrast(color: Color) -> Color:
    """Return black or white, whichever stands out."""
    return (0, 0, 0) if sum(color) > 3 * 110 else (255, 255, 255)


def _draw_legend(
    source: Source,
    canvas: Canvas,
    place: tuple[int, int, int],
    slices: Slices,
    face: Face,
    colors: list[Color],
    *,
    texts_inside: bool,
) -> None:
    """Draw a row for each slice, at (x, y) with a pitch: its colour, label, and share."""
    x, y, pitch = place
    aligned = source.rng.random() < 0.5
    right = x + _legend_width(face, slices, texts_inside)
    for label, share, color in zip(slices.labels, slices.shares, colors, strict=True):
        baseline = y + face.ascent
        middle = y + face.height // 2
        half = _SWATCH // 2
        canvas.box((x, middle - half, x + _SWATCH - 1, middle + half - 1), fill=color)
        row = label if texts_inside or aligned else f"{label}: {share}"
        canvas.text(x + _SWATCH + 6, baseline, row, face)
        if aligned and not texts_inside:
            canvas.text_right(right, baseline, share, face)
        y += pitch
