"""Batches: what is held out, the order, padding, and which tokens count."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData, loss_mask, pack_lengths
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import DataError
from nvvl.model.processor import Message, Processor


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_folder(tiny_checkpoint)


def ids_of(data: DistillData, step: int) -> list[str]:
    return [item_id for batch in data.training_batches(step) for item_id in batch.item_ids]


def test_an_epoch_takes_every_training_item_once(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    recipe = dataclasses.replace(recipe, items_per_step=5)
    data = DistillData(items.items, processor, recipe, seed=0)
    assert len(data.validation) == 4
    assert not set(data.validation) & set(data.training)
    everything = sorted(f"item {index}" for index in data.training)
    for epoch in range(3):  # of two steps
        assert sorted(ids_of(data, 2 * epoch) + ids_of(data, 2 * epoch + 1)) == everything


def test_order_depends_on_seed_and_step_alone(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    one, two = (DistillData(items.items, processor, recipe, seed=5) for _ in range(2))
    other = DistillData(items.items, processor, recipe, seed=6)
    for step in range(5):
        ids_of(one, step)
    assert ids_of(one, 7) == ids_of(two, 7)
    assert [ids_of(one, s) for s in range(4)] != [ids_of(other, s) for s in range(4)]


def test_batches_keep_to_the_token_bound(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    recipe = dataclasses.replace(recipe, items_per_step=10)
    batches = DistillData(items.items, processor, recipe, seed=0).training_batches(0)
    assert len(batches) > 1
    assert sum(len(batch.item_ids) for batch in batches) == 10
    assert all(batch.num_tokens <= 160 or len(batch.item_ids) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 3, 2, 5], [[0, 3], [1, 2]]),
        ([4, 4, 4], [[0, 1], [2]]),
        ([30, 1], [[0], [1]]),  # longer than a row
        ([1] * 25, [list(range(10)), list(range(10, 20)), list(range(20, 25))]),
        ([], []),
    ],
)
def test_items_are_packed_longest_first(lengths: list[int], rows: list[list[int]]) -> None:
    assert pack_lengths(lengths, 10) == rows


def test_images_do_not_count(items: CalibrationSet, processor: Processor) -> None:
    item = items.items[0]
    inputs = processor(item.messages, images=item.images)
    image = inputs.input_ids == processor.config.image_token_id
    assert image.any()
    mask = loss_mask(inputs, "text", image_token_id=processor.config.image_token_id)
    assert not mask[-1]
    assert torch.equal(mask[:-1], ~image[:-1])


def test_answer_positions_are_one_before_the_answer(
    items: CalibrationSet, processor: Processor
) -> None:
    inputs = processor(items.items[1].messages)
    mask = loss_mask(inputs, "answers", image_token_id=processor.config.image_token_id)
    predicted = inputs.input_ids.roll(-1)[mask]
    assert torch.equal(predicted, inputs.input_ids[inputs.answer_mask])


def test_processes_share_the_items_of_a_step(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    alone = DistillData(items.items, processor, recipe, seed=3)
    shares = [
        DistillData(items.items, processor, recipe, seed=3, share=(index, 2)) for index in (0, 1)
    ]
    for step in range(4):
        together = [item_id for data in shares for item_id in ids_of(data, step)]
        assert sorted(together) == sorted(ids_of(alone, step))
    held_out = [i for data in shares for b in data.validation_batches() for i in b.item_ids]
    assert sorted(held_out) == sorted(i for b in alone.validation_batches() for i in b.item_ids)


def test_more_processes_than_items_are_refused(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    with pytest.raises(DataError, match=r"4 processes share the items of a step, and .* has 3"):
        DistillData(items.items, processor, recipe, seed=0, share=(0, 4))


def test_empty_training_split_is_refused(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    with pytest.raises(DataError, match="has 4 items and 4 are kept for validation"):
        DistillData(items.items[:4], processor, recipe, seed=0)


def test_item_without_an_answer_is_named(processor: Processor, recipe: DistillRecipe) -> None:
    mute = [Item(item_id=f"mute {i}", messages=(Message("user", "the"),)) for i in range(6)]
    recipe = dataclasses.replace(recipe, loss_tokens="answers")
    data = DistillData(mute, processor, recipe, seed=0)
    with pytest.raises(DataError, match=r"item mute \d: no token counts for the loss"):
        data.training_batches(0)
