import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from torch.nn import functional

from nvvl.errors import DataError
from nvvl.model import tiling
from nvvl.model.tiling import choose_grid, normalize, open_image, split_image, to_rgb


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def one_pixel(image: Image.Image) -> object:
    return to_rgb(image).getpixel((0, 0))


@pytest.mark.parametrize(
    ("size", "max_num_tiles", "grid"),
    [
        ((512, 512), 12, (1, 1)),
        ((1, 1), 12, (1, 1)),
        # one ratio, several areas: larger only with more than half of the larger grid's pixels
        ((724, 724), 12, (1, 1)),  # 524,176 pixels < 0.5 * 4 tiles = 524,288
        ((725, 725), 12, (2, 2)),
        ((1086, 1086), 12, (2, 2)),  # 1,179,396 < 0.5 * 9 tiles = 1,179,648
        ((1087, 1087), 12, (3, 3)),
        ((4000, 4000), 12, (3, 3)),
        ((4000, 4000), 4, (2, 2)),
        ((4000, 4000), 1, (1, 1)),
        # ratio 1.25 is as far from 1 as from 3/2; exactly half of the pixels is not enough
        ((50, 40), 6, (1, 1)),
        ((1250, 1000), 6, (3, 2)),
        ((1024, 512), 12, (2, 1)),
        ((512, 1024), 12, (1, 2)),
        ((2048, 1024), 12, (4, 2)),
        ((1275, 1650), 12, (3, 4)),  # a letter page at 150 dpi
        ((10_000, 10), 12, (12, 1)),
        ((10, 10_000), 12, (1, 12)),
    ],
)
def test_grid_is_nearest_in_ratio_then_by_area(
    size: tuple[int, int], max_num_tiles: int, grid: tuple[int, int]
) -> None:
    assert choose_grid(*size, tile_size=512, max_num_tiles=max_num_tiles) == grid


def test_grid_refuses_less_than_one_tile() -> None:
    with pytest.raises(ValueError, match="required at least 1, got 0"):
        choose_grid(10, 10, tile_size=512, max_num_tiles=0)


def test_no_two_candidates_of_one_area_are_neighbours_in_ratio() -> None:
    # so the order among equal areas cannot change a choice
    grids = sorted(tiling._candidate_grids(12), key=lambda grid: grid[0] / grid[1])
    areas: dict[float, set[int]] = {}
    for columns, rows in grids:
        areas.setdefault(columns / rows, set()).add(columns * rows)
    ordered = list(areas.values())
    assert all(not (a & b) for a, b in pairwise(ordered))


def test_tiles_are_row_major_and_the_thumbnail_is_last() -> None:
    image = Image.new("RGB", (96, 64))
    for index in range(6):
        corner = (index % 3 * 32, index // 3 * 32)
        image.paste((10 * index, 0, 200), (*corner, corner[0] + 32, corner[1] + 32))
    tiles = split_image(image, tile_size=32, max_num_tiles=12, use_thumbnail=True)
    assert tiles.shape == (7, 3, 32, 32)
    assert tiles.dtype == torch.float32
    for index in range(6):
        assert torch.equal(tiles[index, 0], torch.full((32, 32), 10.0 * index))
    assert torch.all(tiles[:6, 2] == 200)
    # the left and right edge of the thumbnail still show the first and the last tile
    assert tiles[6, 0, 0, 0] == pytest.approx(0, abs=1)
    assert tiles[6, 0, -1, -1] == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("size", "use_thumbnail", "count"), [((96, 64), False, 6), ((40, 40), True, 1)]
)
def test_thumbnail_only_if_wanted_and_more_than_one_tile(
    size: tuple[int, int], use_thumbnail: bool, count: int
) -> None:
    tiles = split_image(noise(*size), tile_size=32, max_num_tiles=6, use_thumbnail=use_thumbnail)
    assert len(tiles) == count


def test_resize_is_antialiased_bicubic_with_overshoot() -> None:
    image = Image.new("RGB", (80, 80), "black")
    image.paste((255, 255, 255), (40, 0, 80, 80))
    tiles = split_image(image, tile_size=32, max_num_tiles=1, use_thumbnail=True)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    expected = functional.interpolate(
        pixels, size=(32, 32), mode="bicubic", antialias=True, align_corners=False
    )
    # float32 against float64: a few dozen products of values up to 255
    torch.testing.assert_close(tiles.double(), expected, atol=1e-3, rtol=0)
    assert tiles.max() > 255
    assert tiles.min() < 0


def test_image_of_tile_size_keeps_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("resized")

    monkeypatch.setattr(functional, "interpolate", refuse)
    image = noise(32, 32)
    tiles = split_image(image, tile_size=32, max_num_tiles=12, use_thumbnail=True)
    assert torch.equal(tiles[0].permute(1, 2, 0), torch.from_numpy(np.array(image)).float())


def test_normalize_by_channel() -> None:
    tiles = torch.tensor([0.0, 255.0, 51.0]).reshape(1, 3, 1, 1)
    result = normalize(tiles, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 0.1))
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, 3.0, 2.0]))


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),  # 128 * 257
        ("I;16", 300, (1, 1, 1)),
        ("I", 32896, (128, 128, 128)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("RGBA", (9, 9, 9, 255), (9, 9, 9)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_any_mode_becomes_rgb(mode: str, color: object, rgb: tuple[int, int, int]) -> None:
    image = Image.new(mode, (2, 2), color)  # type: ignore[arg-type]
    assert one_pixel(image) == rgb


def test_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert one_pixel(image) == (10, 20, 30)
    image.info["transparency"] = 0
    assert one_pixel(image) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "required at least 1 x 1 pixels, got 0 x 5"),
        (Image.new("F", (2, 2)), "mode F"),
        (Image.new("I", (2, 2), 70_000), r"samples reach 70000\.\.70000"),
    ],
)
def test_unusable_image_is_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_rgb(image)


def test_absurd_size_is_refused_before_the_pixels_are_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "MAX_IMAGE_PIXELS", 100)
    to_rgb(noise(10, 10))
    with pytest.raises(DataError, match="11 x 10 pixels are more than the limit of 100"):
        to_rgb(noise(11, 10))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_rotation_is_applied_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    image = Image.new("RGB", (8, 16), "black")
    image.paste((255, 255, 255), (0, 8, 8, 16))  # white below
    image.save(path, exif=exif)
    upright = to_rgb(open_image(path))
    assert upright.size == (16, 8)
    assert upright.convert("L").getpixel((1, 4)) == pytest.approx(255, abs=8)  # JPEG is lossy
    assert upright.convert("L").getpixel((14, 4)) == pytest.approx(0, abs=8)


@pytest.mark.parametrize("value", range(1, 9))
def test_every_exif_turn_is_that_of_pillow(value: int) -> None:
    image = noise(5, 7).convert("RGB")
    image.getexif()[0x0112] = value
    expected = ImageOps.exif_transpose(image)
    assert to_rgb(image).tobytes() == expected.tobytes()
    assert to_rgb(image).size == expected.size


def test_exif_tags_of_a_wrong_type_do_no_harm(tmp_path: Path) -> None:
    # Orientation 6 (SHORT), and XResolution as ASCII, which rewriting the tags would fail on
    entries = [(0x0112, 3, 1, b"\x06\x00\x00\x00"), (0x011A, 2, 3, b"72\x00\x00")]
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    noise(8, 16).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    assert to_rgb(open_image(tmp_path / "a.jpg")).size == (16, 8)


def test_animated_file_gives_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_16_bit_png_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(path)
    assert open_image(path).getpixel((0, 0)) == (128, 128, 128)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such image file"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        open_image(tmp_path / "text.png")
    with pytest.raises(DataError, match="not a file; required an image"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: not a file; required an image"):
        open_image(tmp_path / "pipe.png")


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # else what an earlier test found
    (tmp_path / "photo.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"photo\.png: not an image; required one of AVIF, BMP"):
        open_image(tmp_path / "photo.png")
    assert not started.exists()


def test_whatever_a_decoder_raises_names_the_picture(tmp_path: Path) -> None:
    noise(64, 64).convert("RGB").save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 40] = bytes(40)
    (tmp_path / "a.avif").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.avif: the image cannot be read \("):
        open_image(tmp_path / "a.avif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
        open_image(path)
