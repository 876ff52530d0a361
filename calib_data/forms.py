"""Generated documents of fields and cells: key-value cards, tables and receipts."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvvl.calib_data.drawing import (
    MARGIN,
    Canvas,
    Face,
    FontFile,
    choose_style,
    fit_face,
    fit_size,
    load_face,
    widest,
)
from nvvl.calib_data.texts import TRANSCRIBE, Drawn, Source, Turn, choose_pitch
from nvvl.calib_data.words import belongs

Row = tuple[str, str]
Area = tuple[int, int, int, int]  # left, top, right, bottom in pixels

TITLE = "What is the title?"

_GAP = 10  # px between columns


def ask_value(key: str) -> str:
    """Return the question for a field's value."""
    return f"What is the {key}?"


def ask_cell(column: str, row: str) -> str:
    """Return the question for a table's cell."""
    return f"What is {column} of {row}?"


def inside(canvas: Canvas) -> Area:
    """Return the area of a canvas within its margins."""
    return MARGIN, MARGIN, canvas.width - MARGIN, canvas.height - MARGIN


@dataclass(frozen=True)
class Pair:
    """Faces of one family and size: ``keys`` for keys and headers, ``values`` for the rest."""

    keys: Face
    values: Face

    @property
    def ascent(self) -> int:
        """Pixels of ink above the common baseline."""
        return max(self.keys.ascent, self.values.ascent)

    @property
    def height(self) -> int:
        """Pixels from the highest to the lowest ink."""
        return self.ascent + max(self.keys.descent, self.values.descent)


def fit_pair(
    fonts: tuple[FontFile, FontFile], width_of: Callable[[Pair], int], limit: int, size: int
) -> Pair | None:
    """Find the largest pair of faces, at most ``size``, for which a width is within a limit."""

    def load(at: int) -> Pair:
        return Pair(load_face(fonts[0].file, at), load_face(fonts[1].file, at))

    fitting = fit_size(lambda at: width_of(load(at)), limit, size)
    return None if fitting is None else load(fitting)


def choose_pair(source: Source) -> tuple[FontFile, FontFile]:
    """Draw a font for values, and the same or another style of it for keys."""
    font = source.font()
    return (choose_style(source.rng, font) if source.rng.random() < 0.5 else font), font


# cards


def draw_card(source: Source) -> Drawn:
    """Draw three to seven fields with values, now and then under a title."""
    canvas = source.canvas()
    rng = source.rng
    left, top, right, bottom = inside(canvas)
    turns: list[Turn] = []
    if rng.random() < 0.3:
        title, top = draw_title(source, canvas, (left, top, right, bottom))
        turns.append((TITLE, title))
    fields = source.strings.fields(rng.randint(3, 7))
    drawn = draw_fields(source, canvas, (left, top, right, bottom), fields)
    asked = rng.sample(drawn.rows, min(len(fields), rng.randint(3, 5)))
    turns += [(ask_value(key), value) for key, value in asked]
    if drawn.layout == "colon" and top == MARGIN:
        turns.append((TRANSCRIBE, "\n".join(f"{key}: {value}" for key, value in drawn.rows)))
    return Drawn([canvas], turns)


def draw_title(
    source: Source, canvas: Canvas, area: Area, *, max_size: int = 26
) -> tuple[str, int]:
    """Draw a title at the top of an area.

    Returns:
        The title, and the y below it.
    """
    left, top, right, _ = area
    rng = source.rng
    face = None
    while face is None:
        title = source.strings.title(24)
        face = fit_face(source.font(), [title], right - left, rng.randint(16, max_size))
    x = rng.choice((left, left + (right - left - face.width(title)) // 2))
    canvas.text(x, top + face.ascent, title, face, canvas.palette.accent)
    bottom = top + face.height + 4
    if rng.random() < 0.4:
        canvas.rule(left, bottom, right)
        bottom += 3
    return title, bottom + 2


@dataclass(frozen=True)
class Fields:
    """Drawn fields: their (key, value) rows from top to bottom, and the layout's name."""

    rows: list[Row]
    layout: str


def draw_fields(
    source: Source, canvas: Canvas, area: Area, fields: Sequence[Row]
) -> Fields:
    """Draw fields in one of four layouts inside an area.

    Args:
        fields: Field names, each with its kind of value.
    """
    rng = source.rng
    left, top, right, bottom = area
    layout = rng.choice(("colon", "colon", "columns", "leader", "boxed"))
    count = len(fields)
    size = min(rng.randint(13, 24), (bottom - top) * 10 // (count * 14))
    rows, pair = _compose_fields(source, layout, right - left - 2 * _GAP, size, fields)
    padding = 5 if layout == "boxed" else 0
    pitch = choose_pitch(rng, pair.height + 2 * padding, count, bottom - top)
    used = pitch * (count - 1) + pair.height + 2 * padding
    y = top + rng.randint(0, bottom - top - used)
    x = left + rng.randint(0, _GAP)
    _LAYOUTS[layout](canvas, rows, (x, y + padding, right - _GAP, y + used), pitch, pair)
    return Fields(rows, layout)


def _compose_fields(
    source: Source, layout: str, limit: int, size: int, fields: Sequence[Row]
) -> tuple[list[Row], Pair]:
    """Draw values that fit a width in some font, ever shorter until they do."""
    max_chars = 24
    while True:
        rows = [(key, source.strings.value(kind, max_chars)) for key, kind in fields]
        pair = fit_pair(choose_pair(source), lambda at: _width(layout, rows, at), limit, size)
        if pair is not None:
            return rows, pair
        max_chars = max(max_chars - 3, 6)


def _width(layout: str, rows: Sequence[Row], pair: Pair) -> int:
    """Return the width that rows take in a layout."""
    if layout == "colon":
        return max(pair.keys.width(f"{key}: ") + pair.values.width(value) for key, value in rows)
    if layout == "leader":
        dots = pair.values.width(" .... ")
        return max(pair.keys.width(key) + dots + pair.values.width(value) for key, value in rows)
    keys = widest(pair.keys, [key for key, _ in rows])
    return keys + 2 * _GAP + widest(pair.values, [value for _, value in rows])


def _draw_colon(canvas: Canvas, rows: list[Row], area: Area, pitch: int, pair: Pair) -> None:
    baseline = area[1] + pair.ascent
    for key, value in rows:
        x = canvas.text(area[0], baseline, f"{key}: ", pair.keys)
        canvas.text(x, baseline, value, pair.values)
        baseline += pitch


def _draw_columns(canvas: Canvas, rows: list[Row], area: Area, pitch: int, pair: Pair) -> None:
    baseline = area[1] + pair.ascent
    second = area[0] + widest(pair.keys, [key for key, _ in rows]) + 2 * _GAP
    for key, value in rows:
        canvas.text(area[0], baseline, key, pair.keys, canvas.palette.accent)
        canvas.text(second, baseline, value, pair.values)
        baseline += pitch


def _draw_leader(canvas: Canvas, rows: list[Row], area: Area, pitch: int, pair: Pair) -> None:
    """Draw keys at the left, values at the right and dots between; dots are not text."""
    left, top, right, _ = area
    baseline = top + pair.ascent
    for key, value in rows:
        behind = canvas.text(left, baseline, key, pair.keys)
        start = canvas.text_right(right, baseline, value, pair.values)
        for x in range(behind + 5, start - 5, 5):
            canvas.box((x, baseline - 1, x, baseline - 1), fill=canvas.palette.ink)
        baseline += pitch


def _draw_boxed(canvas: Canvas, rows: list[Row], area: Area, pitch: int, pair: Pair) -> None:
    """Draw a grid of two columns, the first shaded."""
    left, top, right, _ = area
    second = left + widest(pair.keys, [key for key, _ in rows]) + _GAP
    y = top - (pitch - pair.height) // 2
    bottom = y + pitch * len(rows)
    canvas.box((left - 4, y, second - 4, bottom), fill=canvas.palette.faint)
    for key, value in rows:
        canvas.rule(left - 4, y, right + 4)
        baseline = y + (pitch - pair.height) // 2 + pair.ascent
        canvas.text(left, baseline, key, pair.keys)
        canvas.text(second + 2, baseline, value, pair.values)
        y += pitch
    canvas.box((left - 4, bottom - pitch * len(rows), right + 4, y), outline=canvas.palette.accent)


_LAYOUTS = {
    "colon": _draw_colon,
    "columns": _draw_columns,
    "leader": _draw_leader,
    "boxed": _draw_boxed,
}


# tables

_COLUMNS = (
    ("Price", "price"),
    ("Qty", "number"),
    ("Total", "money"),
    ("Date", "date"),
    ("Code", "code"),
    ("City", "place"),
    ("Owner", "last_name"),
    ("Score", "decimal"),
    ("Share", "percent"),
    ("Time", "time"),
    ("Weight", "amount"),
    ("Year", "number"),
    ("Cost", "price"),
    ("Type", "word"),
    ("Rate", "percent"),
    ("Stock", "number"),
    ("ID", "code"),
    ("Color", "word"),
    ("Points", "number"),
    ("Height", "amount"),
    ("Lead", "first_name"),
    ("Zone", "word"),
    ("Start", "time"),
    ("Value", "decimal"),
)
_CORNERS = ("Item", "Name", "Product", "Part", "Team", "Project", "Plan", "Group", "Site", "Unit")


def draw_table(source: Source) -> Drawn:
    """Draw a header and three to six rows; the first of two to four columns names the row."""
    canvas = source.canvas()
    rng = source.rng
    cells = draw_grid(
        source, canvas, inside(canvas), rows=rng.randint(3, 6), columns=rng.randint(2, 4)
    )
    return Drawn([canvas], ask_cells(rng, cells, rng.randint(3, 5)))


def ask_cells(rng: random.Random, cells: list[list[str]], count: int) -> list[Turn]:
    """Draw questions for cells of a table whose first row and column are names."""
    places = [(r, c) for r in range(1, len(cells)) for c in range(1, len(cells[0]))]
    asked = rng.sample(places, min(count, len(places)))
    return [(ask_cell(cells[0][c], cells[r][0]), cells[r][c]) for r, c in asked]


def draw_grid(
    source: Source, canvas: Canvas, area: Area, *, rows: int, columns: int
) -> list[list[str]]:
    """Draw a table inside an area and return its cells, header row first."""
    rng = source.rng
    left, top, right, bottom = area
    padding = rng.randint(4, 6)
    limit = right - left - columns * 2 * padding
    size = min(rng.randint(12, 20), (bottom - top) * 10 // ((rows + 1) * 16))
    cells, pair = _compose_cells(source, limit, rows, columns, size)
    widths = [size + 2 * padding for size in _column_widths(cells, pair)]
    spare = right - left - sum(widths)
    stretch = rng.randint(0, spare // columns)
    widths = [width + stretch for width in widths]
    pitch = choose_pitch(rng, pair.height + 4, rows + 1, bottom - top)
    pitch = min(pitch, (bottom - top) // (rows + 1))
    x = left + rng.randint(0, right - left - sum(widths))
    y = top + rng.randint(0, bottom - top - pitch * (rows + 1))
    _draw_cells(canvas, rng, cells, (x, y), widths, pitch, padding, pair)
    return cells


def _compose_cells(
    source: Source, limit: int, rows: int, columns: int, size: int
) -> tuple[list[list[str]], Pair]:
    """Draw cells that fit a width in some font, with ever shorter texts until they do."""
    rng, strings = source.rng, source.strings
    max_chars = 14 if columns < 4 else 10
    while True:
        kinds = rng.sample(_COLUMNS, columns - 1)
        cells = [[rng.choice(_CORNERS), *(name for name, _ in kinds)]]
        for label in strings.labels(rows, max(max_chars - 2, 5)):
            cells.append([label, *(strings.value(kind, max_chars) for _, kind in kinds)])
        pair = fit_pair(
            choose_pair(source), lambda at: sum(_column_widths(cells, at)), limit, size
        )
        if pair is not None:
            return cells, pair
        max_chars = max(max_chars - 1, 5)


def _column_widths(cells: list[list[str]], pair: Pair) -> list[int]:
    """Return the text width of each column in pixels."""
    return [
        max(pair.keys.width(column[0]), widest(pair.values, column[1:]))
        for column in zip(*cells, strict=True)
    ]


def _draw_cells(
    canvas: Canvas,
    rng: random.Random,
    cells: list[list[str]],
    corner: tuple[int, int],
    widths: list[int],
    pitch: int,
    padding: int,
    pair: Pair,
) -> None:
    left, top = corner
    right = left + sum(widths)
    ruled, framed, shaded = (rng.random() < 0.5 for _ in range(3))
    to_right = [column > 0 and rng.random() < 0.4 for column in range(len(widths))]
    if shaded:
        canvas.box((left, top, right, top + pitch), fill=canvas.palette.faint)
    for index, row in enumerate(cells):
        y = top + index * pitch
        if ruled or index == 1:
            canvas.rule(left, y, right)
        baseline = y + (pitch - pair.height) // 2 + pair.ascent
        face = pair.keys if index == 0 else pair.values
        x = left
        for width, text, flush in zip(widths, row, to_right, strict=True):
            if flush:
                canvas.text_right(x + width - padding, baseline, text, face)
            else:
                canvas.text(x + padding, baseline, text, face)
            x += width
    if framed:
        canvas.box((left, top, right, top + pitch * len(cells)), outline=canvas.palette.accent)
        for x in (left + sum(widths[:column]) for column in range(1, len(widths))):
            canvas.draw.line((x, top, x, top + pitch * len(cells)), fill=canvas.palette.accent)


# receipts


def draw_receipt(source: Source) -> Drawn:
    """Draw items with prices, their total, and the name of the shop."""
    canvas = source.canvas()
    rng = source.rng
    left, top, right, bottom = inside(canvas)
    title, top = draw_title(source, canvas, (left, top, right, bottom), max_size=22)
    lines, total = _compose_receipt(source, rng.randint(3, 6))
    num_lines = len(lines) + 1
    size = min(rng.randint(13, 20), (bottom - top) * 10 // (num_lines * 14))
    pair = None
    while pair is None:
        pair = fit_pair(
            choose_pair(source),
            lambda at: _width("leader", [*lines, total], at),
            right - left,
            size,
        )
    pitch = choose_pitch(rng, pair.height, num_lines, bottom - top - 8)
    inset = rng.randint(0, max(0, (right - left - _width("leader", lines, pair)) // 3))
    baseline = top + pair.ascent
    for name, price in lines:
        canvas.text(left + inset, baseline, name, pair.values)
        canvas.text_right(right - inset, baseline, price, pair.values)
        baseline += pitch
    canvas.rule(left + inset, baseline - pair.ascent + 1, right - inset)
    baseline += 6
    canvas.text(left + inset, baseline, total[0], pair.keys)
    canvas.text_right(right - inset, baseline, total[1], pair.keys)
    asked = rng.sample(lines, min(len(lines), 3))
    turns = [(TITLE, title), (ask_value("Total"), total[1])]
    return Drawn([canvas], turns + [(f"What does {name} cost?", price) for name, price in asked])


def _compose_receipt(source: Source, count: int) -> tuple[list[Row], Row]:
    """Draw items whose prices add up to a total of the split."""
    rng, strings = source.rng, source.strings
    sign = rng.choice(("", "", "$"))

    def price() -> str:
        return f"{sign}{rng.randrange(50, 10 ** rng.randint(3, 4)) / 100:.2f}"

    names = strings.labels(count, 12)
    while True:
        rows = [(name, strings.keep(price)) for name in names]
        cents = sum(round(float(text.removeprefix("$")) * 100) for _, text in rows)
        total = f"{sign}{cents / 100:.2f}"
        if belongs(total, strings.split):
            return rows, ("Total", total)
