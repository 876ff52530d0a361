"""Generated documents of cells: tables and receipts."""

import random
from functools import partial

from nvvl.calib_data.drawing import Canvas, widest
from nvvl.calib_data.forms import (
    TITLE,
    Area,
    Pair,
    Row,
    ask_value,
    choose_pair,
    draw_title,
    fields_width,
    fit_pair,
    inside,
)
from nvvl.calib_data.texts import Drawn, Source, Turn, choose_pitch
from nvvl.calib_data.words import belongs

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
    ("Visits", "number"),
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


def ask_cell(column: str, row: str) -> str:
    """Return the question for a table's cell."""
    return f"What is {column} of {row}?"


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
        pair = fit_pair(choose_pair(source), partial(_table_width, cells), limit, size)
        if pair is not None:
            return cells, pair
        max_chars = max(max_chars - 1, 5)


def _column_widths(cells: list[list[str]], pair: Pair) -> list[int]:
    """Return the text width of each column in pixels."""
    return [
        max(pair.keys.width(column[0]), widest(pair.values, column[1:]))
        for column in zip(*cells, strict=True)
    ]


def _table_width(cells: list[list[str]], pair: Pair) -> int:
    return sum(_column_widths(cells, pair))


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
            partial(fields_width, "leader", [*lines, total]),
            right - left,
            size,
        )
    pitch = choose_pitch(rng, pair.height, num_lines, bottom - top - 8)
    inset = rng.randint(0, max(0, (right - left - fields_width("leader", lines, pair)) // 3))
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
