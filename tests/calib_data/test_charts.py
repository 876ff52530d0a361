"""Line and pie charts: what is drawn is what is answered, and marks lie where they are said to."""

import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from nvvl.calib_data import line_charts, pie_charts
from nvvl.calib_data.charts import STEPS
from nvvl.calib_data.documents import make_document
from nvvl.calib_data.drawing import Canvas, Palette, Split
from nvvl.calib_data.marks import Marks, on_circle
from nvvl.calib_data.spec import SetSpec

SPLITS: tuple[Split, ...] = ("train", "held_out")
WHITE, RED, BLUE = (255, 255, 255), (200, 0, 0), (0, 0, 200)


def blank() -> Canvas:
    return Canvas((100, 80), Palette(WHITE, (0, 0, 0), (0, 0, 0), WHITE))


def covered(image: Image.Image, channel: int, box: tuple[int, int, int, int]) -> float:
    """Return how many pixels of a box are covered by a colour that lacks a channel."""
    return float((1 - np.asarray(image.crop(box))[..., channel] / 255).sum())


def test_line_passes_through_its_points() -> None:
    canvas = blank()
    marks = Marks(canvas)
    marks.line([(10, 70), (50, 20), (90, 60)], RED, width=3, marker="s", marker_size=7)
    marks.draw()
    for point in [(10, 69), (30, 45), (50, 20), (70, 40), (89, 60)]:
        assert canvas.image.getpixel(point) == RED
    assert canvas.image.getpixel((10, 10)) == WHITE
    assert canvas.image.getpixel((47, 17)) == RED  # a corner of the square marker


def test_dashes_are_given_in_pixels() -> None:
    canvas = blank()
    marks = Marks(canvas)
    marks.line([(10, 40.5), (90, 40.5)], RED, width=3, dash=(6, 4))
    marks.draw()
    row = [canvas.image.getpixel((x, 40)) == WHITE for x in range(10, 90)]
    gaps = [index for index, (one, two) in enumerate(pairwise(row)) if two and not one]
    assert {second - first for first, second in pairwise(gaps)} == {10}


def test_sectors_have_the_area_of_their_angle() -> None:
    canvas = blank()
    marks = Marks(canvas)
    marks.sector((50, 40), 30, (90, 180), RED, edge=RED)
    marks.sector((50, 40), 30, (-90, 0), BLUE, edge=BLUE, ring=10)
    marks.draw()
    # edges of one pixel add half of it along each arc; the boxes end at the straight edges
    quarter = math.pi / 4 * 30**2 + math.pi / 2 * 30 / 2
    assert covered(canvas.image, 1, (19, 9, 50, 40)) == pytest.approx(quarter, rel=0.02)
    ring = math.pi / 4 * (30**2 - 20**2) + math.pi / 2 * (30 + 20) / 2
    assert covered(canvas.image, 0, (50, 40, 81, 71)) == pytest.approx(ring, rel=0.02)
    assert canvas.image.getpixel((40, 30)) == RED  # 90 to 180 degrees: up and to the left
    assert canvas.image.getpixel((68, 58)) == BLUE
    assert canvas.image.getpixel((55, 45)) == WHITE


def test_points_of_a_circle_go_against_the_clock() -> None:
    assert on_circle((50, 40), 10, 0) == pytest.approx((60, 40))
    assert on_circle((50, 40), 10, 90) == pytest.approx((50, 30))


def test_shares_fill_the_circle() -> None:
    for seed in range(40):
        for split in SPLITS:
            turns = dict(make_document("pie_chart", seed, split=split).turns)
            shares = [float(a[:-1]) for q, a in turns.items() if q.startswith("What is the share")]
            assert len(shares) == 2
            assert all(6 <= share <= 88 for share in shares)
            assert sum(shares) <= 94.1  # the rest has a slice of at least six


def test_named_slice_is_the_largest() -> None:
    seen = set()
    for seed in range(80):
        turns = dict(make_document("pie_chart", seed, split="train").turns)
        for question, compare in ((pie_charts.LARGEST, max), (pie_charts.SMALLEST, min)):
            if question in turns:
                seen.add(question)
                named = pie_charts.ask_share(turns[question])
                shares = {
                    q: float(a[:-1]) for q, a in turns.items() if q.startswith("What is the s")
                }
                if named in shares:
                    assert shares[named] == compare(shares.values())
    assert seen == {pie_charts.LARGEST, pie_charts.SMALLEST}


@pytest.mark.parametrize("split", SPLITS)
def test_line_charts_have_one_series_or_two(split: Split) -> None:
    kinds = set()
    for seed in range(60):
        questions = [q for q, _ in make_document("line_chart", seed, split=split).turns]
        two = any(" at " in question for question in questions)
        one = bool({line_charts.HIGHEST, line_charts.LOWEST} & set(questions))
        assert one != two
        assert any(question.startswith("Where is ") for question in questions) == two
        kinds.add(two)
    assert kinds == {True, False}


def test_line_that_is_higher_is_named() -> None:
    checked = 0
    for seed in range(160):
        turns = dict(make_document("line_chart", seed, split="train").turns)
        for question, answer in turns.items():
            if not question.startswith("Which line is higher"):
                continue
            label = question.removesuffix("?").rpartition(" ")[2]
            values = {
                q: int(a) for q, a in turns.items() if q.endswith(f" at {label}?") and q != question
            }
            if len(values) == 2:
                checked += 1
                assert values[line_charts.ask_point(label, answer)] == max(values.values())
    assert checked >= 3


def test_values_on_an_axis_lie_on_its_ticks() -> None:
    """The lowest printed tick above zero divides each value that is asked of two series."""
    checked = 0
    for seed in range(60):
        document = make_document("line_chart", seed, split="train")
        values = [int(a) for q, a in document.turns if q.startswith("What is") and " at " in q]
        if values:
            checked += 1
            printed = "".join(glyph.char for glyph in document.glyphs[0])
            double = next(2 * s for s in STEPS if f"0{2 * s}{4 * s}{6 * s}{8 * s}" in printed)
            assert all(value % (double // 2) == 0 and value <= 4 * double for value in values)
    assert checked >= 5


def test_specs_name_the_kinds() -> None:
    spec = SetSpec.from_dict(
        {
            "name": "charts",
            "sources": [
                {"kind": "documents", "kinds": ["line_chart", "pie_chart", "chart"], "count": 3}
            ],
        }
    )
    assert spec.to_dict()["sources"][0]["kinds"] == ["line_chart", "pie_chart", "chart"]
