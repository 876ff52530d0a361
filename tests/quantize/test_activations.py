"""Items within a memory budget, in spans and on disk: the same values whatever the budget."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.errors import OutputError
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.quantize import activations as activations_module
from nvvl.quantize import walk as walk_module
from nvvl.quantize.activations import Activations
from nvvl.quantize.limits import Limits
from nvvl.quantize.presets import nvfp4
from nvvl.quantize.walk import quantize_checkpoint

QuantizeTiny = Callable[[str], Path]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("budget", [0, 6000, None])
def test_limits_change_no_byte(
    budget: int | None,
    overlap: bool,
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = folder_bytes(quantize_tiny("nvfp4"))
    kept: list[int] = []
    store = Activations._store

    def watch(self: Activations, *args: Any) -> None:
        store(self, *args)
        kept.append(self._in_memory)

    monkeypatch.setattr(Activations, "_store", watch)
    limits = Limits(overlap=overlap, activation_bytes=budget)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration_set, limits=limits)
    assert folder_bytes(tmp_path / "out") == expected
    if budget is not None:
        assert max(kept) <= budget
    else:
        assert max(kept) > 6000, "the budget of this test held nothing back"


def test_interrupted_run_with_items_on_disk_goes_on(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    limits = Limits(activation_bytes=0)
    stages: list[str] = []
    for last in ("layers.2", "layers.5"):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(
                *(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration_set),
                limits=limits,
                progress=lambda stage, *_: stages.append(stage),
                stop=lambda last=last: stages[-1].endswith(last),  # type: ignore[misc]
            )
        # fewer in memory now, or all of them: the spill serves both
        limits = Limits()
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration_set)
    assert stages.count("language_model.backbone.layers.2") == len(calibration_set.items) + 1
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))


def test_neither_memory_nor_disk_is_refused(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walk_module, "_SPARE_BYTES", 10**18)
    with pytest.raises(OutputError, match=r"memory holds 0\.00 GB of them, .* give more --memory"):
        quantize_checkpoint(
            *(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration_set),
            limits=Limits(activation_bytes=100),
        )
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration_set)


def test_long_items_go_through_in_spans(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every layer gets its state handed on: the result is the whole model's up to rounding."""
    model, processor = load_model(tiny_checkpoint), Processor.from_folder(tiny_checkpoint)
    item = calibration_set.items[1]
    inputs = processor(item.messages, images=item.images)
    assert len(inputs.pixel_values) > 2
    monkeypatch.setattr(activations_module, "SPAN_TOKENS", 5)
    monkeypatch.setattr(activations_module, "SPAN_TILES", 2)
    hidden = model.embed(inputs.input_ids[None], model.encode_images(inputs.pixel_values))
    spans = hidden
    for layer in model.language_model.backbone.layers:
        hidden, _ = layer(hidden)
        spans = activations_module._in_spans(layer, spans)
    # bfloat16 has 8 bits; sums in another order may round each layer's output differently
    assert (spans - hidden).float().norm() < 0.02 * hidden.float().norm()
    block = model.vision_model.radio_model.model.blocks[0]
    tiles = model.vision_model.radio_model.model.patch_generator(inputs.pixel_values)
    parts = activations_module._in_parts(block, tiles)
    torch.testing.assert_close(parts, block(tiles), atol=0.05, rtol=0.02)


def test_spill_that_cannot_be_finished_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    activations = Activations(
        [], Processor.from_folder(tiny_checkpoint), device=torch.device("cpu"), tick=lambda: None
    )
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        activations.run_block(lambda: None, tmp_path / "activations-00001-0", room=10**9)
    assert list(tmp_path.iterdir()) == []
