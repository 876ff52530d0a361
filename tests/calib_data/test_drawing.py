import random

import pytest
from PIL import Image, ImageDraw, ImageFont

from nvvl.calib_data.drawing import (
    FONTS,
    MIN_SIZE,
    Canvas,
    FontFile,
    Palette,
    Split,
    choose_font,
    choose_palette,
    fit_face,
    fit_size,
    list_fonts,
    load_face,
)

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
PAPER = Palette((255, 255, 255), (0, 0, 0), (90, 0, 0), (220, 220, 220))


def all_fonts() -> list[FontFile]:
    families = [*list_fonts("train").values(), *list_fonts("held_out").values()]
    return [font for files in families for font in files]


def test_enough_families_and_none_on_both_sides() -> None:
    train, held_out = set(list_fonts("train")), set(list_fonts("held_out"))
    assert len(train) >= 50
    assert len(held_out) >= 14
    assert not train & held_out
    kinds = {files[0].kind for files in list_fonts("held_out").values()}
    assert kinds == {"sans", "serif", "mono", "condensed"}


def test_every_font_is_listed_with_its_licence_and_none_is_left_over() -> None:
    files = {font.file for font in all_fonts()}
    assert files == {path.name for path in FONTS.iterdir() if path.suffix in (".ttf", ".otf")}
    rows = [line.split(" | ") for line in (FONTS / "README.md").read_text().splitlines()]
    licenses = {row[0].removeprefix("| "): row[5] for row in rows if len(row) == 7}
    assert files <= set(licenses)
    texts = {path.stem.removeprefix("LICENSE-") for path in FONTS.glob("LICENSE-*.txt")}
    for file in files:
        for name in licenses[file].split(" AND "):
            assert name == "Public-Domain" or any(text.startswith(name) for text in texts), file


def test_fonts_take_at_most_two_megabytes() -> None:
    assert sum((FONTS / font.file).stat().st_size for font in all_fonts()) <= 2_000_000


@pytest.mark.parametrize("font", all_fonts(), ids=lambda font: font.file)
def test_every_printable_character_has_ink_of_its_own(font: FontFile) -> None:
    stamps = load_face(font.file, 24).stamps
    images = {char: stamps[char].opacity for char in PRINTABLE if char != " "}
    assert all(image.getbbox() for image in images.values())
    # a font without a character draws the same box for each one that is missing
    assert len({(image.size, image.tobytes()) for image in images.values()}) >= 88


def test_text_is_drawn_as_pillow_draws_it() -> None:
    text = "Total: 1,234.50 (kg)"
    font = list_fonts("train")["Lato"][0]
    canvas = Canvas((256, 64), PAPER)
    canvas.text(10, 40, text, load_face(font.file, 18))
    expected = Image.new("RGB", (256, 64), "white")
    pillow = ImageFont.truetype(str(FONTS / font.file), 18, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(expected).text((10, 40), text, font=pillow, fill=(0, 0, 0), anchor="ls")
    assert canvas.image.tobytes() == expected.tobytes()


def test_glyphs_have_the_characters_in_order_and_their_ink() -> None:
    canvas = Canvas((256, 64), PAPER)
    face = load_face(list_fonts("train")["Roboto"][0].file, 20)
    end = canvas.text(8, 40, "a b|c", face)
    assert [glyph.char for glyph in canvas.glyphs] == ["a", "b", "|", "c"]
    assert end == 8 + face.width("a b|c")
    for glyph in canvas.glyphs:
        assert min(canvas.image.crop(glyph.box).convert("L").tobytes()) < 128
    for glyph in canvas.glyphs:
        canvas.box((glyph.x0, glyph.y0, glyph.x1 - 1, glyph.y1 - 1), fill=(255, 255, 255))
    assert set(canvas.image.tobytes()) == {255}


def test_text_right_ends_where_asked() -> None:
    canvas = Canvas((256, 64), PAPER)
    face = load_face(list_fonts("train")["Roboto"][0].file, 20)
    start = canvas.text_right(200, 40, "12.50", face)
    assert start + face.width("12.50") == 200


@pytest.mark.parametrize(
    ("limit", "size", "expected"),
    [(200, 20, 20), (200, 40, 20), (199, 40, 19), (120, 40, MIN_SIZE), (119, 40, None)],
)
def test_fit_size_takes_the_largest_that_fits(limit: int, size: int, expected: int | None) -> None:
    assert fit_size(lambda at: 10 * at, limit, size) == expected


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_fitted_text_is_no_wider_than_the_limit_and_a_size_more_would_be(split: Split) -> None:
    rng = random.Random(0)
    for _ in range(40):
        font = choose_font(rng, split)
        text = "".join(rng.choices(PRINTABLE, k=16))
        face = fit_face(font, [text], 200, 60)
        assert face is not None
        assert face.width(text) <= 200
        assert load_face(font.file, face.size + 2).width(text) > 200


def test_chosen_fonts_are_of_the_split() -> None:
    rng = random.Random(0)
    families = {choose_font(rng, "held_out").family for _ in range(300)}
    assert families == set(list_fonts("held_out"))


def test_ink_differs_from_background_and_fill() -> None:
    rng = random.Random(0)
    for _ in range(300):
        palette = choose_palette(rng)
        colors = (palette.background, palette.ink, palette.accent, palette.faint)
        paper, ink, accent, faint = (
            Image.new("RGB", (1, 1), color).convert("L").tobytes()[0] for color in colors
        )
        assert abs(paper - ink) >= 70
        assert abs(paper - accent) >= 55
        assert abs(faint - ink) >= 60
