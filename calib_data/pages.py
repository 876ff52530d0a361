"""Generated documents of several tiles: pages of mixed content, and two pages at once."""

import random

from nvvl.calib_data.drawing import MARGIN, Canvas
from nvvl.calib_data.forms import (
    TITLE,
    Area,
    Row,
    ask_value,
    draw_fields,
    draw_title,
    inside,
)
from nvvl.calib_data.tables import ask_cells, draw_grid
from nvvl.calib_data.texts import TILE, Drawn, Source, Turn, compose_paragraph

_PAGE_SIZES = ((2 * TILE, 2 * TILE), (2 * TILE, 2 * TILE), (2 * TILE, TILE), (TILE, 2 * TILE))
_GUTTER = 14  # px between blocks of a page


def draw_page(source: Source) -> Drawn:
    """Draw a page of two or four tiles: a title, then blocks of fields, tables and text."""
    rng = source.rng
    canvas = source.canvas(*rng.choice(_PAGE_SIZES))
    whole = (MARGIN + 2, MARGIN + 2, canvas.width - MARGIN - 2, canvas.height - MARGIN - 2)
    title, top = draw_title(source, canvas, whole, max_size=34)
    turns: list[Turn] = [(TITLE, title)]
    blocks = _split_area((whole[0], top + 4, whole[2], whole[3]))
    kinds = [_draw_field_block, _draw_table_block, _draw_marked_line, _draw_paragraph]
    rng.shuffle(kinds)
    for area, draw in zip(blocks, kinds, strict=False):
        turns += draw(source, canvas, area)
    return Drawn([canvas], turns)


def _split_area(area: Area) -> list[Area]:
    """Cut an area into blocks about a tile in size: two beside or below each other, or four."""
    left, top, right, bottom = area
    columns = [(left, right)]
    if right - left > TILE:
        middle = (left + right) // 2
        columns = [(left, middle - _GUTTER // 2), (middle + _GUTTER // 2, right)]
    rows = [(top, bottom)]
    if bottom - top > TILE:
        middle = (top + bottom) // 2
        rows = [(top, middle - _GUTTER // 2), (middle + _GUTTER // 2, bottom)]
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def _draw_field_block(source: Source, canvas: Canvas, area: Area) -> list[Turn]:
    fields = source.strings.fields(source.rng.randint(3, 5))
    rows = draw_fields(source, canvas, area, fields).rows
    return [(ask_value(key), value) for key, value in source.rng.sample(rows, 3)]


def _draw_table_block(source: Source, canvas: Canvas, area: Area) -> list[Turn]:
    rng = source.rng
    cells = draw_grid(source, canvas, area, rows=rng.randint(3, 5), columns=rng.randint(2, 3))
    return ask_cells(rng, cells, 2)


def _draw_marked_line(source: Source, canvas: Canvas, area: Area) -> list[Turn]:
    """Draw one line in a frame or between rules, to be found among the rest."""
    rng = source.rng
    left, top, right, bottom = area
    text, face = source.fit(lambda: source.strings.line(6, 24), right - left - 16, sizes=(14, 24))
    height = face.height + 12
    y = rng.randint(top, bottom - height)
    x = left + rng.randint(0, right - left - face.width(text) - 16)
    width = face.width(text) + 15
    if rng.random() < 0.5:
        canvas.box(
            (x, y, x + width, y + height - 1),
            fill=rng.choice((None, canvas.palette.faint)),
            outline=canvas.palette.accent,
        )
        question = "What is written in the box?"
    else:
        canvas.rule(x, y, x + width, width=2)
        canvas.rule(x, y + height - 2, x + width, width=2)
        question = "What is written between the lines?"
    canvas.text(x + 8, y + 6 + face.ascent, text, face)
    return [(question, text)]


def _draw_paragraph(source: Source, canvas: Canvas, area: Area) -> list[Turn]:
    rng = source.rng
    left, top, right, bottom = area
    lines, face = compose_paragraph(source, right - left, rng.randint(3, 5), 18)
    pitch = min(face.height + rng.randint(1, 6), (bottom - top) // len(lines))
    y = top + rng.randint(0, bottom - top - pitch * (len(lines) - 1) - face.height)
    for index, line in enumerate(lines):
        canvas.text(left, y + face.ascent + index * pitch, line, face)
    return [("Transcribe the paragraph.", "\n".join(lines))]


def draw_two_pages(source: Source) -> Drawn:
    """Draw two tiles of fields; some field names stand on both pages, with other values."""
    rng = source.rng
    first = source.strings.fields(rng.randint(3, 5))
    repeated = [field for field in first if rng.random() < 0.4]
    fresh = [field for field in source.strings.fields(8) if field not in first]
    second = (repeated + fresh)[: max(rng.randint(3, 5), len(repeated))]
    rng.shuffle(second)
    canvases = [source.canvas(), source.canvas()]
    pages = [
        draw_fields(source, canvas, inside(canvas), fields).rows
        for canvas, fields in zip(canvases, (first, second), strict=True)
    ]
    turns = [turn for index in (0, 1) for turn in _ask_page(rng, pages, index)]
    rng.shuffle(turns)
    return Drawn(canvases, turns)


def _ask_page(rng: random.Random, pages: list[list[Row]], index: int) -> list[Turn]:
    """Ask for values of one page; a key that both pages have needs the page in the question."""
    others = {key for key, _ in pages[1 - index]}
    turns: list[Turn] = []
    for key, value in rng.sample(pages[index], 2):
        if key in others or rng.random() < 0.5:
            turns.append((f"What is the {key} on page {index + 1}?", value))
        else:
            turns.append((ask_value(key), value))
    return turns
