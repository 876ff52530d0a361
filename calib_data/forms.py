"""Generated documents of fields: key-value cards, and what other documents take from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nvvl.calib_data.drawing import (
    MARGIN,
    Canvas,
    Face,
    FontFile,
    choose_style,
    fit_size,
    load_face,
    widest,
)
from nvvl.calib_data.texts import (
    SCRAMBLED_SIZES,
    TRANSCRIBE,
    Drawn,
    Source,
    Turn,
    choose_pitch,
)

Row = tuple[str, str]
Area = tuple[int, int, int, int]  # left, top, right, bottom in pixels

TITLE = "What is the title?"

_GAP = 10  # px between columns


def ask_value(key: str) -> str:
    """Return the question for a field's value."""
    return f"What is the {key}?"


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


def draw_scrambled_card(source: Source) -> Drawn:
    """Draw four to eight fields, most in small print, most with values that nothing foretells."""
    canvas = source.canvas()
    rng = source.rng
    fields = [
        (key, "scrambled" if rng.random() < 0.7 else kind)
        for key, kind in source.strings.fields(rng.randint(4, 8))
    ]
    sizes = rng.choice(SCRAMBLED_SIZES)
    rows = draw_fields(source, canvas, inside(canvas), fields, sizes=sizes).rows
    turns = [(ask_value(key), value) for key, value in rows]
    rng.shuffle(turns)
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
    title, face = source.fit(lambda: source.strings.title(24), right - left, sizes=(16, max_size))
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
    source: Source,
    canvas: Canvas,
    area: Area,
    fields: Sequence[Row],
    *,
    sizes: tuple[int, int] = (13, 24),
) -> Fields:
    """Draw fields, each a name with a kind of value, in one of four layouts inside an area.

    ``sizes`` are the least and most of the wanted size; it is smaller where the area needs it.
    """
    rng = source.rng
    left, top, right, bottom = area
    layout = rng.choice(("colon", "colon", "columns", "leader", "boxed"))
    count = len(fields)
    size = min(rng.randint(*sizes), (bottom - top) * 10 // (count * 14))
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
        pair = fit_pair(choose_pair(source), partial(fields_width, layout, rows), limit, size)
        if pair is not None:
            return rows, pair
        max_chars = max(max_chars - 3, 6)


def fields_width(layout: str, rows: Sequence[Row], pair: Pair) -> int:
    """Return the width in pixels that (key, value) rows take in a layout."""
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
