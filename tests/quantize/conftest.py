"""Calibration items, and the tiny model quantized with each preset once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.model.prompt import Message
from nvvl.model.video import Video
from nvvl.quantize import walk as walk_module
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint

QuantizeTiny = Callable[[str], Path]


def random_image(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session", autouse=True)
def spare_no_disk() -> Iterator[None]:
    """Let items be spilled where the disk of temporary files is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_module, "_SPARE_BYTES", 0)
        yield


@pytest.fixture(scope="session")
def items() -> tuple[Item, ...]:
    """Items of different lengths and kinds: one tile, many tiles, text, a video, two images."""
    frames = tuple(random_image(10 + i, 32, 32) for i in range(3))
    video = Video(frames=frames, fps=2.0, frame_indices=(0, 1, 2))
    return (
        _item("one tile", "<image>\nthe thing", images=(random_image(0, 32, 32),)),
        _item("tiles", "in the <image>", images=(random_image(1, 100, 40),)),
        _item("text", "the thing in the thing in the thing in the thing"),
        _item("video", "<video> the", videos=(video,)),
        _item(
            "two", "<image> in <image>", images=(random_image(2, 32, 32), random_image(3, 64, 32))
        ),
    )


@pytest.fixture(scope="session")
def calibration_set(items: tuple[Item, ...]) -> CalibrationSet:
    return CalibrationSet(items=items, spec="test", num_requested=len(items))


@pytest.fixture(scope="session")
def quantize_tiny(
    tiny_checkpoint: Path, calibration_set: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> QuantizeTiny:
    """Return a function that gives the folder of the tiny model quantized with a preset."""
    folder = tmp_path_factory.mktemp("quantized")

    def get(preset: str) -> Path:
        out = folder / preset
        if not out.exists():
            quantize_checkpoint(tiny_checkpoint, out, PRESETS[preset](), calibration_set)
        return out

    return get


def _item(
    item_id: str,
    question: str,
    *,
    images: tuple[Image.Image, ...] = (),
    videos: tuple[Video, ...] = (),
) -> Item:
    messages = (Message("user", question), Message("assistant", f"the {item_id}"))
    return Item(item_id=item_id, messages=messages, images=images, videos=videos)
