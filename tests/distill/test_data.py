"""Batches: what is held out, the order, padding, and which tokens count."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData, loss_mask
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import DataError
from nvvl.model.processor import Message, Processor, collate


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_folder(tiny_checkpoint)


def ids_of(data: DistillData, step: int) -> list[str]:
    return [item_id for batch in data.training_batches(step) for item_id in batch.item_ids]


def test_an_epoch_takes_every_training_item_once(
    items: CalibrationSet, processor: Processor, recipe: DistillRecipe
) -> None:
    data = DistillData(items.items, processor, recipe, seed=0)
    assert len(data.validation) == 4
    assert not set(data.validation) & set(data.training)
    seen = [item_id for step in range(10) for item_id in ids_of(data, step)]
    epochs = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(len(set(epoch)) == 10 for epoch in epochs[:1])
    assert sorted(seen) == sorted(f"item {index}" for index in data.training for _ in range(3))


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
    for batch in batches:
        assert batch.inputs.input_ids.numel() <= 160 or len(batch.item_ids) == 1


def test_images_and_padding_do_not_count(items: CalibrationSet, processor: Processor) -> None:
    chosen = [items.items[index] for index in (0, 1)]
    batch = collate([processor(i.messages, images=i.images) for i in chosen], 0)
    image = batch.input_ids == processor.config.image_token_id
    assert image.any()
    assert not batch.padding_mask.all()

    text = loss_mask(batch, "text", image_token_id=processor.config.image_token_id)
    assert not text[:, -1].any()
    assert torch.equal(text[:, :-1], (batch.padding_mask & ~image)[:, :-1])


def test_answer_positions_are_one_before_the_answer(
    items: CalibrationSet, processor: Processor
) -> None:
    batch = collate([processor(items.items[1].messages)], 0)
    mask = loss_mask(batch, "answers", image_token_id=processor.config.image_token_id)
    predicted = batch.input_ids.roll(-1, dims=1)[mask]
    assert torch.equal(predicted, batch.input_ids[batch.answer_mask])


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
