import random

import pytest
from PIL import ImageChops, ImageStat

from nvvl.calib_data.drawing import Canvas, Palette, list_fonts, load_face
from nvvl.calib_data.wear import MAX_DEGREES, _rotate, wear

PAPER = Palette((255, 255, 255), (0, 0, 0), (90, 0, 0), (220, 220, 220))


def draw() -> Canvas:
    canvas = Canvas((512, 512), PAPER)
    face = load_face(list_fonts("train")["Open Sans"][0].file, 20)
    for y in (40, 250, 490):
        canvas.text(12, y, "Corner to corner, from left to right: 0123", face)
    return canvas


def test_wear_depends_on_the_generator_alone() -> None:
    for seed in range(20):
        first, second = (wear(draw(), random.Random(seed)) for _ in range(2))
        assert first[0].tobytes() == second[0].tobytes()
        assert first[1] == second[1]


def test_wear_changes_pages_but_keeps_ink_darker_than_paper() -> None:
    changed = 0
    for seed in range(60):
        canvas = draw()
        image, glyphs = wear(canvas, random.Random(seed))
        changed += ImageChops.difference(image, canvas.image).getbbox() is not None
        grey = image.convert("L")
        for glyph in glyphs:
            low, high = ImageStat.Stat(grey.crop(glyph.box)).extrema[0]
            assert high - low >= 60, (seed, glyph)
    assert changed >= 30


@pytest.mark.parametrize("degrees", [MAX_DEGREES, -MAX_DEGREES])
def test_rotated_boxes_hold_all_the_ink(degrees: float) -> None:
    canvas = draw()
    image = canvas.image.rotate(degrees, fillcolor=PAPER.background)
    for glyph in canvas.glyphs:
        rotated = _rotate(glyph, degrees, image.size)
        assert 0 <= rotated.x0 < rotated.x1 <= 512
        assert 0 <= rotated.y0 < rotated.y1 <= 512
        image.paste("white", rotated.box)
    assert set(image.tobytes()) == {255}
