"""A look at a calibration set: one picture with a row of small pictures for each domain."""

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nvvl.calib_data.drawing import FONTS, list_fonts
from nvvl.calib_data.items import Item

PER_DOMAIN = 6

_SIDE = 180
_GAP = 10
_LINE = 16
_TEXT_LINES = 11
_INK = (30, 30, 30)
_PAPER = (244, 244, 240)


class SheetMaker:
    """Keeps the first items of each domain as small pictures, and lays them out."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Image.Image]] = {}
        self._num_items: dict[str, int] = {}

    def add(self, item: Item) -> None:
        """Take an item; of several pictures the first is shown."""
        row = self._rows.setdefault(item.domain, [])
        self._num_items[item.domain] = self._num_items.get(item.domain, 0) + 1
        if len(row) < PER_DOMAIN:
            row.append(_draw_cell(item))

    def save(self, path: Path) -> None:
        """Write the sheet as PNG."""
        height = _SIDE + 2 * _LINE + _GAP
        width = PER_DOMAIN * (_SIDE + _GAP) + _GAP
        sheet = Image.new("RGB", (width, len(self._rows) * height + _GAP), _PAPER)
        draw = ImageDraw.Draw(sheet)
        for index, (domain, cells) in enumerate(self._rows.items()):
            top = _GAP + index * height
            _write(draw, (_GAP, top), f"{domain}: {self._num_items[domain]} items", _SIDE * 4)
            for column, cell in enumerate(cells):
                sheet.paste(cell, (_GAP + column * (_SIDE + _GAP), top + _LINE + 2))
        sheet.save(path, format="PNG")


def _draw_cell(item: Item) -> Image.Image:
    """Draw an item's first picture with a line about it, or the beginning of its text."""
    cell = Image.new("RGB", (_SIDE, _SIDE + _LINE), _PAPER)
    draw = ImageDraw.Draw(cell)
    pictures = item.images or tuple(video.frames[0] for video in item.videos)
    if not pictures:
        words = " ".join(message.content for message in item.messages).split()
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), fill="white")
        for number in range(_TEXT_LINES):
            line, words = _fill_line(words, _SIDE - 8)
            _write(draw, (4, 2 + number * _LINE), line, _SIDE - 8)
        caption = "text"
    else:
        small = pictures[0].copy()
        small.thumbnail((_SIDE, _SIDE))
        cell.paste(small, ((_SIDE - small.width) // 2, (_SIDE - small.height) // 2))
        caption = f"{pictures[0].width} x {pictures[0].height}"
        if item.videos:
            caption += f", {sum(len(video.frames) for video in item.videos)} frames"
        elif len(pictures) > 1:
            caption += f", {len(pictures)} images"
    _write(draw, (2, _SIDE), caption, _SIDE)
    return cell


def _fill_line(words: list[str], width: int) -> tuple[str, list[str]]:
    line = ""
    while words and _font().getlength(_ascii(f"{line} {words[0]}")) <= width:
        line, words = f"{line} {words[0]}".strip(), words[1:]
    return (line, words) if line or not words else (words[0], words[1:])


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    text = _ascii(text)
    while text and _font().getlength(text) > width:
        text = text[:-1]
    draw.text(place, text, fill=_INK, font=_font())


def _ascii(text: str) -> str:
    """Replace what the bundled fonts do not have."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


@cache
def _font() -> ImageFont.FreeTypeFont:
    fonts = (font for files in list_fonts("train").values() for font in files)
    file = next(font.file for font in fonts if font.kind == "sans")
    return ImageFont.truetype(FONTS / file, 12, layout_engine=ImageFont.Layout.BASIC)
