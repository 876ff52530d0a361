"""What a row becomes: teacher's hidden states, EVS, terms of layers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.prepare import Preparer, layer_loss
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.student import Student
from nvvl.model.processor import Message, Processor, Video
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.amaxes import CALIBRATION_NAME, read_amaxes
from nvvl.quantize.load import read_recipe_formats
from nvvl.quantize.side_files import RECIPE_NAME
from nvvl.quantize.targets import list_linears, quantized_only

CPU = torch.device("cpu")


@pytest.fixture
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_folder(tiny_checkpoint)


def video_item(num_frames: int) -> Item:
    pixels = np.random.default_rng(0).integers(0, 256, (num_frames, 32, 32, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in pixels]
    video = Video(frames, fps=2.0, frame_indices=tuple(range(num_frames)))
    messages = (Message("user", "<video>\nthe thing"), Message("assistant", "answer"))
    return Item(item_id="video", messages=messages, videos=(video,))


def test_rows_hold_what_each_item_gives_alone(
    teacher: NemotronNanoVL, processor: Processor, items: CalibrationSet, recipe: DistillRecipe
) -> None:
    recipe = dataclasses.replace(recipe, tokens_per_batch=1000)
    data = DistillData(items.items, processor, recipe, seed=0)
    (batch,) = data.pack([0, 1, 3])  # two with images
    prepared = Preparer(teacher, recipe, device=CPU)(batch)
    assert isinstance(prepared.teacher, torch.Tensor)
    assert prepared.packing.lengths == tuple(len(inputs.input_ids) for inputs in batch.inputs)
    parts = prepared.teacher.split([int(mask.sum()) for mask in batch.loss_masks])
    for inputs, mask, found in zip(batch.inputs, batch.loss_masks, parts, strict=True):
        features = teacher.encode_images(inputs.pixel_values) if len(inputs.pixel_values) else None
        embeds = teacher.embed(inputs.input_ids[None], features)
        hidden, _ = teacher.language_model.hidden_states(embeds)
        # bfloat16: chunks of the scan begin elsewhere
        torch.testing.assert_close(found, hidden[0][mask], rtol=0.05, atol=0.05)
    next_ids = [
        inputs.input_ids.roll(-1)[mask]
        for inputs, mask in zip(batch.inputs, batch.loss_masks, strict=True)
    ]
    assert torch.equal(prepared.targets, torch.cat(next_ids))


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 24), (0.5, 12), (0.75, 6), (0.9, 4)])
def test_evs_drops_video_tokens_alone(
    rate: float, kept: int, teacher: NemotronNanoVL, processor: Processor, recipe: DistillRecipe
) -> None:
    recipe = dataclasses.replace(recipe, video_pruning_rate=rate, num_validation_items=1)
    data = DistillData([video_item(6)] * 2, processor, recipe, seed=0)
    (batch,) = data.pack([0])
    prepared = Preparer(teacher, recipe, device=CPU)(batch)
    num_text = int((batch.inputs[0].input_ids != teacher.config.image_token_id).sum())
    assert prepared.embeds.shape[1] == prepared.packing.lengths[0] == num_text + kept
    assert prepared.num_positions == batch.num_positions  # what counts is text


def test_layer_loss_is_zero_for_equal_layers_and_relative() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(1, 5, 8, generator=generator) for _ in range(3)]
    assert float(layer_loss(layers, layers)) == 0
    doubled = [2 * layer for layer in layers]
    assert float(layer_loss(doubled, layers)) == pytest.approx(1)
    assert float(layer_loss([100 * x for x in doubled], [100 * x for x in layers])) == (
        pytest.approx(1)
    )


def test_layer_term_has_gradients_where_the_recipe_asks_for_it(
    run: Path,
    teacher: NemotronNanoVL,
    processor: Processor,
    items: CalibrationSet,
    recipe: DistillRecipe,
) -> None:
    formats = quantized_only(read_recipe_formats(run / RECIPE_NAME, list_linears(teacher.config)))
    amaxes = read_amaxes(run / CALIBRATION_NAME, formats)
    for weight in (0.0, 1.0):
        recipe = dataclasses.replace(recipe, layer_loss=weight)
        student = Student(teacher, formats, amaxes, recipe)
        prepare = Preparer(teacher, recipe, device=CPU)
        data = DistillData(items.items, processor, recipe, seed=0)
        prepared = prepare(data.training_batches(0)[0])
        assert len(prepared.layers) == (len(student.backbone.layers) if weight else 0)
        _, of_layers = prepare.loss(student.backbone, prepared)
        assert (of_layers is None) == (weight == 0)
        if of_layers is not None:
            assert float(of_layers.detach()) > 0
            of_layers.backward()
            student.collect_gradients()
            # the final norm lies behind the last layer
            no_gradient = {name for name, m in student.masters.items() if m.grad is None}
            assert no_gradient == {"language_model.backbone.norm_f.weight"}
