"""Generated bar charts, drawn without a plotting library so that pixels and values are exact."""

import random
from dataclasses import dataclass

from nvvl.calib_data.drawing import Canvas, Color, Face, fit_face, mix, widest
from nvvl.calib_data.forms import TITLE, Area, draw_title, inside
from nvvl.calib_data.texts import Drawn, Source, Turn
from nvvl.calib_data.words import belongs

LARGEST = "Which bar is the largest?"
SMALLEST = "Which bar is the smallest?"

STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000)
COLORS: tuple[Color, ...] = (
    (66, 120, 180),
    (200, 90, 60),
    (80, 150, 90),
    (150, 110, 170),
    (205, 150, 50),
    (90, 150, 160),
)


@dataclass(frozen=True)
class Bars:
    """Values to draw.

    Attributes:
        scale: What a bar of full length stands for.
        step: Distance of the axis' ticks, or 0 if the values are printed beside the bars.
    """

    labels: list[str]
    values: list[int]
    scale: int
    step: int


def ask_bar(label: str) -> str:
    """Return the question for a bar's value."""
    return f"What is the value of {label}?"


def draw_chart(source: Source) -> Drawn:
    """Draw three to six bars, upright or lying, with printed values or an axis to read."""
    rng = source.rng
    canvas = source.canvas()
    left, top, right, bottom = inside(canvas)
    turns: list[Turn] = []
    if rng.random() < 0.6:
        title, top = draw_title(source, canvas, (left, top, right, bottom), max_size=20)
        turns.append((TITLE, title))
    upright = rng.random() < 0.5
    bars = compose_bars(source, rng.randint(3, 4 if upright else 6), 7 if upright else 11)
    draw = _draw_upright if upright else _draw_lying
    draw(source, canvas, (left, top, right, bottom), bars)
    asked = rng.sample(list(zip(bars.labels, bars.values, strict=True)), 2)
    turns += [(ask_bar(label), str(value)) for label, value in asked]
    pick, question = (max, LARGEST) if rng.random() < 0.7 else (min, SMALLEST)
    turns.append((question, bars.labels[bars.values.index(pick(bars.values))]))
    return Drawn([canvas], turns)


def compose_bars(source: Source, count: int, max_chars: int) -> Bars:
    """Draw different values of the split; with an axis they lie on its ticks."""
    rng, split = source.rng, source.strings.split
    labels = source.strings.labels(count, max_chars)
    if rng.random() < 0.4:
        for step in rng.sample(STEPS, len(STEPS)):
            ticks = [step * index for index in range(1, 9) if belongs(str(step * index), split)]
            if len(ticks) >= count:
                values = rng.sample(ticks, count)
                return Bars(labels, values, step * 8, step)
    top = 10 ** rng.randint(3, 4)  # few numbers of two digits are held out
    found: dict[int, None] = {}
    while len(found) < count:
        found[int(source.strings.keep(lambda: str(rng.randrange(top // 20, top))))] = None
    return Bars(labels, list(found), max(found), 0)


def _bar_colors(canvas: Canvas, rng: random.Random, count: int) -> list[Color]:
    """Draw one colour for all bars, or one each, tinted by the ink."""
    colors = rng.sample(COLORS, count)
    if rng.random() < 0.5:
        colors = [colors[0]] * count
    return [mix(color, canvas.palette.ink, 0.15) for color in colors]


def choose_face(source: Source, texts: list[str], limit: int, size: int) -> Face:
    """Draw fonts until one, at most ``size``, holds each text within ``limit`` pixels."""
    face = None
    while face is None:
        face = fit_face(source.font(), texts, limit, size)
    return face


def grid_color(canvas: Canvas) -> Color:
    """Return the colour of grid lines: a little ink in the background."""
    return mix(canvas.palette.background, canvas.palette.ink, 0.3)


def _ticks(bars: Bars) -> list[int]:
    return list(range(0, bars.scale + 1, bars.step)) if bars.step else []


def _draw_upright(source: Source, canvas: Canvas, area: Area, bars: Bars) -> None:
    rng = source.rng
    left, top, right, bottom = area
    slot = (right - left - 40) // len(bars.labels)
    texts = [*bars.labels, *map(str, bars.values)]
    face = choose_face(source, texts, slot - 6, rng.randint(12, 16))
    ticks = _ticks(bars)
    left += widest(face, [str(bars.scale)]) + 8 if ticks else 4
    slot = (right - left) // len(bars.labels)
    floor = bottom - face.height - 5
    ceiling = top + face.height + 4
    for tick in ticks:
        y = floor - (floor - ceiling) * tick // bars.scale
        canvas.rule(left, y, right, grid_color(canvas))
        if tick % (2 * bars.step) == 0:
            baseline = y + face.ascent // 2
            canvas.text_right(left - 4, baseline, str(tick), face)
    for index, (label, value, color) in enumerate(
        zip(bars.labels, bars.values, _bar_colors(canvas, rng, len(bars.labels)), strict=True)
    ):
        middle = left + slot * index + slot // 2
        y = floor - (floor - ceiling) * value // bars.scale
        canvas.box((middle - slot // 3, y, middle + slot // 3, floor - 1), fill=color)
        start = middle - face.width(label) // 2
        canvas.text(start, floor + 4 + face.ascent, label, face)
        if not ticks:
            text = str(value)
            canvas.text(middle - face.width(text) // 2, y - 3 - face.descent, text, face)
    canvas.rule(left, floor, right)


def _draw_lying(source: Source, canvas: Canvas, area: Area, bars: Bars) -> None:
    rng, palette = source.rng, canvas.palette
    left, top, right, bottom = area
    face = choose_face(source, bars.labels, 90, rng.randint(12, 17))
    ticks = _ticks(bars)
    floor = bottom - (face.height + 6 if ticks else 0)
    slot = min((floor - top) // len(bars.labels), 46)
    start = left + widest(face, bars.labels) + 6
    reach = right - start - (widest(face, [str(bars.scale)]) // 2 if ticks else 0)
    reach -= 0 if ticks else widest(face, [str(value) for value in bars.values]) + 6
    foot = top + slot * len(bars.labels)
    for tick in ticks:
        x = start + reach * tick // bars.scale
        canvas.draw.line((x, top, x, foot), fill=grid_color(canvas))
        if tick % (4 * bars.step) == 0:
            text = str(tick)
            canvas.text(x - face.width(text) // 2, foot + 5 + face.ascent, text, face)
    for index, (label, value, color) in enumerate(
        zip(bars.labels, bars.values, _bar_colors(canvas, rng, len(bars.labels)), strict=True)
    ):
        y = top + slot * index
        end = start + reach * value // bars.scale
        half = slot // 3
        canvas.box((start, y + slot // 2 - half, end, y + slot // 2 + half), fill=color)
        baseline = y + slot // 2 + (face.ascent - face.descent) // 2
        canvas.text_right(start - 5, baseline, label, face)
        if not ticks:
            canvas.text(end + 5, baseline, str(value), face)
    canvas.draw.line((start, top, start, foot), fill=palette.accent)
