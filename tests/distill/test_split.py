"""The split: what may not stand on both sides of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.listing import DEFAULT
from nvvl.calib_data.manifest import CalibrationSet, LazyItems
from nvvl.calib_data.sources import failing_source
from nvvl.distill.blockwise import distill_blockwise
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.rotate import rotate
from nvvl.distill.split import split_items
from nvvl.distill.survey import survey_set
from nvvl.distill.train import distill
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.video import Video


def make_set(items: Sequence[Item]) -> CalibrationSet:
    return CalibrationSet(items=tuple(items), spec="test", num_requested=len(items))


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, 0, 0))


def video(*levels: int) -> Video:
    return Video([picture(level) for level in levels], 2.0, tuple(range(len(levels))))


def make_item(text: str, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()) -> Item:
    marks = "<image>" * len(images) + "<video>" * len(videos)
    messages = (Message("user", marks + text), Message("assistant", "answer"))
    return Item(f"item of {text}", messages, tuple(images), tuple(videos))


@pytest.fixture
def mixed() -> CalibrationSet:
    """Items 0 to 2 share pictures, 3 and 4 a video, 5 and 6 a text; the others nothing."""
    return make_set(
        [
            make_item("a", [picture(1)]),
            make_item("b", [picture(1), picture(2)]),
            make_item("c", [picture(2)]),
            make_item("d", videos=[video(0, 3)]),
            make_item("e", videos=[video(0, 3)]),
            make_item("f"),
            make_item("f"),
            make_item("a", [picture(4)]),
            make_item("d", videos=[video(0, 5)]),
            *(make_item(f"g{index}") for index in range(5)),
        ]
    )


def find_groups(items: CalibrationSet) -> list[list[int]]:
    return [list(group) for group in survey_set(items, lambda _: None).groups]


def test_items_are_grouped_by_picture_video_or_whole_text(mixed: CalibrationSet) -> None:
    assert sorted(find_groups(mixed)) == [[0, 1, 2], [3, 4], [5, 6]]


def test_no_group_stands_on_both_sides(mixed: CalibrationSet, recipe: DistillRecipe) -> None:
    groups = find_groups(mixed)
    halved = 0
    for seed in range(20):
        training, held_out = split_items(14, recipe, seed=seed, groups=groups)
        assert sorted(training + held_out) == list(range(14))
        assert 1 <= len(held_out) <= recipe.num_validation_items
        assert all(
            set(group) <= set(held_out) or not set(group) & set(held_out) for group in groups
        )
        alone = set(split_items(14, recipe, seed=seed)[1])
        halved += any(0 < len(alone & set(group)) < len(group) for group in groups)
    assert halved > 10  # what the groups are for


def test_set_that_shares_nothing_is_split_as_ever(
    items: CalibrationSet, recipe: DistillRecipe
) -> None:
    groups = find_groups(items)
    assert groups == []
    training, held_out = split_items(14, recipe, seed=0, groups=groups)
    assert held_out == [3, 4, 6, 7]
    assert training == [0, 1, 2, 5, 8, 9, 10, 11, 12, 13]


def test_default_set_is_not_drawn_for_its_split() -> None:
    source = failing_source("page", DataError("was drawn"))
    assert find_groups(CalibrationSet(LazyItems([source]), DEFAULT, 1)) == []
    with pytest.raises(DataError, match="was drawn"):
        find_groups(CalibrationSet(LazyItems([source]), "folder", 1))


def distill_whole(run: Path, source: Path, items: CalibrationSet, out: Path) -> None:
    distill(
        run, source, out, DistillRecipe(name="x", learning_rate=1e-6, num_validation_items=4), items
    )


def distill_layers(run: Path, source: Path, items: CalibrationSet, out: Path) -> None:
    recipe = DistillRecipe(name="x", method="layers", learning_rate=1e-6, num_validation_items=4)
    distill_blockwise(run, source, out, recipe, items)


def learn_rotation(run: Path, source: Path, items: CalibrationSet, out: Path) -> None:
    rotate(source, out, items, num_held_out=4)


@pytest.mark.parametrize("train", [distill_whole, distill_layers, learn_rotation])
def test_set_of_one_picture_leaves_nothing_to_hold_out(
    train: Callable[[Path, Path, CalibrationSet, Path], None],
    run: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    shared = [make_item(f"{index}", [picture(1)]) for index in range(14)]
    with pytest.raises(DataError, match=r"up to 4 items that share no picture .* groups of 14 and"):
        train(run, tiny_checkpoint, make_set(shared), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
