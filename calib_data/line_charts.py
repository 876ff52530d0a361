"""Generated line charts: one series with printed values or an axis to read, or two with a legend.

No model of this project was trained on them, so they stand for layouts that a model never saw.
"""

import random
from dataclasses import dataclass

from nvvl.calib_data.charts import (
    COLORS,
    STEPS,
    ask_bar,
    choose_face,
    compose_bars,
    grid_color,
)
from nvvl.calib_data.drawing import Canvas, Color, Face, mix, widest
from nvvl.calib_data.forms import TITLE, Area, draw_title, inside
from nvvl.calib_data.marks import Marks, Point
from nvvl.calib_data.texts import TILE, Drawn, Source, Turn
from nvvl.calib_data.words import belongs

HIGHEST = "Which point is the highest?"
LOWEST = "Which point is the lowest?"

_MARKERS = ("o", "s", "^", "D", "v")
_DASHES: tuple[tuple[float, ...], ...] = ((), (), (6, 3), (2, 2))
_NUM_TICKS = 8
_MARKER = 6  # px


@dataclass(frozen=True)
class Lines:
    """Values to draw.

    Attributes:
        labels: Below the points.
        names: Of the series; empty where there is one.
        values: One list a series.
        scale: What the full height stands for.
        step: Distance of the axis' ticks, or 0 if the values are printed at the points.
    """

    labels: list[str]
    names: list[str]
    values: list[list[int]]
    scale: int
    step: int


@dataclass(frozen=True)
class _Frame:
    """Where things lie: x of each point, y of zero and of the scale, and the face of texts."""

    xs: list[int]
    floor: int
    ceiling: int
    face: Face

    def y(self, value: int, scale: int) -> int:
        return self.floor - (self.floor - self.ceiling) * value // scale


def ask_point(label: str, name: str) -> str:
    """Return the question for the value of one of several series at a label."""
    return f"What is the value of {name} at {label}?"


def ask_higher(label: str) -> str:
    """Return the question for the series with the larger value at a label."""
    return f"Which line is higher at {label}?"


def ask_highest(name: str) -> str:
    """Return the question for the label at which a series is the highest."""
    return f"Where is {name} the highest?"


def draw_line_chart(source: Source) -> Drawn:
    """Draw three to seven points of one or two series."""
    rng = source.rng
    wide = rng.random() < 0.3
    canvas = source.canvas(2 * TILE if wide else TILE, TILE)
    left, top, right, bottom = inside(canvas)
    turns: list[Turn] = []
    if rng.random() < 0.6:
        title, top = draw_title(source, canvas, (left, top, right, bottom), max_size=20)
        turns.append((TITLE, title))
    lines = _compose(source, rng.randint(4, 7) if wide else rng.randint(3, 4))
    _draw(source, canvas, (left, top, right, bottom), lines)
    return Drawn([canvas], turns + _ask(source, lines))


def _compose(source: Source, count: int) -> Lines:
    """Draw one or two series that lie on ticks, or one as bars have."""
    rng = source.rng
    if rng.random() < 0.5:
        bars = compose_bars(source, count, 7)
        return Lines(bars.labels, [], [bars.values], bars.scale, bars.step)
    num_series = rng.choice((1, 2, 2))
    step = rng.choice(STEPS)
    ticks = [step * index for index in range(1, _NUM_TICKS + 1)]
    words = source.strings.labels(count + num_series, 7)
    names = words[count:] if num_series > 1 else []
    values = [rng.sample(ticks, count) for _ in range(num_series)]
    return Lines(words[:count], names, values, step * _NUM_TICKS, step)


def _ask(source: Source, lines: Lines) -> list[Turn]:
    """Ask for values that are of the split, and compare points and lines."""
    of_split = [
        [i for i, value in enumerate(values) if belongs(str(value), source.strings.split)]
        for values in lines.values
    ]
    ask = _ask_two if lines.names else _ask_one
    return ask(source.rng, lines, of_split)


def _ask_one(rng: random.Random, lines: Lines, of_split: list[list[int]]) -> list[Turn]:
    (values,), (askable,) = lines.values, of_split
    asked = rng.sample(askable, min(2, len(askable)))
    turns = [(ask_bar(lines.labels[index]), str(values[index])) for index in asked]
    pick, question = (max, HIGHEST) if rng.random() < 0.7 else (min, LOWEST)
    return [*turns, (question, lines.labels[values.index(pick(values))])]


def _ask_two(rng: random.Random, lines: Lines, of_split: list[list[int]]) -> list[Turn]:
    turns: list[Turn] = []
    for name, values, askable in zip(lines.names, lines.values, of_split, strict=True):
        if askable:
            index = rng.choice(askable)
            turns.append((ask_point(lines.labels[index], name), str(values[index])))
        turns.append((ask_highest(name), lines.labels[values.index(max(values))]))
    first, second = lines.values
    differing = [i for i, label in enumerate(lines.labels) if first[i] != second[i]]
    if differing:
        index = rng.choice(differing)
        higher = lines.names[0 if first[index] > second[index] else 1]
        turns.append((ask_higher(lines.labels[index]), higher))
    return turns


def _draw(source: Source, canvas: Canvas, area: Area, lines: Lines) -> None:
    rng = source.rng
    left, top, right, bottom = area
    count = len(lines.labels)
    numbers = [str(value) for values in lines.values for value in values]
    slot = (right - left - 40) // count
    face = choose_face(source, [*lines.labels, *numbers], slot - 6, rng.randint(12, 15))
    left += widest(face, [str(lines.scale)]) + 8 if lines.step else 4
    slot = (right - left) // count
    legend = face.height + 8 if lines.names else 0
    frame = _Frame(
        xs=[left + slot * index + slot // 2 for index in range(count)],
        floor=bottom - face.height - 6,
        ceiling=top + legend + face.height + 8,
        face=face,
    )
    _draw_axes(canvas, (left, top, right, bottom), lines, frame)
    colors = [mix(color, canvas.palette.ink, 0.15) for color in rng.sample(COLORS, 2)]
    _draw_lines(rng, canvas, lines, frame, colors, swatches=(left, top + face.height // 2))
    if lines.names:
        x = left
        for name in lines.names:
            x = canvas.text(x + 30, top + face.ascent, name, face) + 8
    for label, x in zip(lines.labels, frame.xs, strict=True):
        canvas.text(x - face.width(label) // 2, frame.floor + 5 + face.ascent, label, face)
    if not lines.step:
        _print_values(canvas, lines, frame)


def _draw_axes(canvas: Canvas, area: Area, lines: Lines, frame: _Frame) -> None:
    left, _, right, _ = area
    face = frame.face
    for tick in range(0, lines.scale + 1, lines.step) if lines.step else ():
        y = frame.y(tick, lines.scale)
        canvas.rule(left, y, right, grid_color(canvas))
        if tick % (2 * lines.step) == 0:
            canvas.text_right(left - 4, y + face.ascent // 2, str(tick), face)
    canvas.rule(left, frame.floor, right)
    canvas.draw.line((left, frame.ceiling, left, frame.floor), fill=canvas.palette.accent)


def _draw_lines(
    rng: random.Random,
    canvas: Canvas,
    lines: Lines,
    frame: _Frame,
    colors: list[Color],
    *,
    swatches: tuple[int, int],
) -> None:
    """Draw the series, and a piece of each in the legend, which begins at ``swatches``."""
    marks = Marks(canvas)
    markers = rng.sample(_MARKERS, 2)
    x, y = swatches
    for series, values in enumerate(lines.values):
        points: list[Point] = [
            (at, frame.y(value, lines.scale)) for at, value in zip(frame.xs, values, strict=True)
        ]
        if not lines.names and rng.random() < 0.3:
            feet = [(frame.xs[-1], frame.floor), (frame.xs[0], frame.floor)]
            marks.area([*points, *feet], colors[series], opacity=0.25)
        width, dash = rng.choice((1.5, 2.0, 2.5)), rng.choice(_DASHES)
        pieces = [points]
        if lines.names:
            pieces.append([(x, y), (x + 24, y)])
            x += 30 + frame.face.width(lines.names[series]) + 8
        for piece in pieces:
            marks.line(
                piece,
                colors[series],
                width=width,
                dash=dash,
                marker=markers[series],
                marker_size=_MARKER,
            )
    marks.draw()


def _print_values(canvas: Canvas, lines: Lines, frame: _Frame) -> None:
    """Print each value above its point, or below a valley, on a plate that hides the line."""
    (values,) = lines.values
    face = frame.face
    for index, (x, value) in enumerate(zip(frame.xs, values, strict=True)):
        y = frame.y(value, lines.scale)
        neighbours = values[max(index - 1, 0) : index] + values[index + 1 : index + 2]
        below = y + _MARKER + face.height < frame.floor - 3 and value < min(neighbours)
        top = y + _MARKER - 1 if below else y - _MARKER - face.height + 1
        text = str(value)
        start = x - face.width(text) // 2
        plate = (start - 1, top, start + face.width(text), top + face.height - 1)
        canvas.box(plate, fill=canvas.palette.background)
        canvas.text(start, top + face.ascent, text, face)
