"""Images to normalized tiles, the way the released model is served.

An image is resized, ignoring its aspect ratio, to the grid of square tiles whose ratio is nearest
to its own, and cut row by row; a thumbnail of the whole image follows when there is more than one
tile (InternVL's tiling, arXiv 2404.16821 section 3.2).

The resize is torch's antialiased bicubic on float pixel values, and values it throws outside
0..255 at sharp edges are kept, as vLLM keeps them. TensorRT-LLM clamps, and older processors
resize with Pillow: calibration, distillation and evaluation must all use one choice, and this file
is that choice.

Also here: what makes any Pillow image an 8-bit RGB one. Colour profiles are not applied.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from nvvl.errors import DataError, first_line

# Where Pillow itself refuses to open a file; images made in memory are held to the same limit.
MAX_IMAGE_PIXELS = 178_956_970

# Formats of pictures that Pillow decodes itself; EPS and WMF would start other programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def choose_grid(width: int, height: int, *, tile_size: int, max_num_tiles: int) -> tuple[int, int]:
    """Choose the tile grid whose ratio is nearest to an image's.

    Of two grids equally near, the larger one wins if the image has more than half of its pixels.

    Args:
        width: Image width in pixels.
        height: Image height in pixels.
        tile_size: Side of a tile in pixels.
        max_num_tiles: Most tiles the grid may have, without the thumbnail.

    Returns:
        (columns, rows).

    Raises:
        ValueError: if `max_num_tiles` is less than 1.
    """
    if max_num_tiles < 1:
        raise ValueError(f"max_num_tiles: required at least 1, got {max_num_tiles}")
    ratio = width / height
    best = (1, 1)
    best_distance = float("inf")
    for columns, rows in _candidate_grids(max_num_tiles):
        distance = abs(ratio - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def count_tiles(
    width: int, height: int, *, tile_size: int, max_num_tiles: int, use_thumbnail: bool
) -> int:
    """Count the tiles that `split_image` cuts an image of a size into."""
    columns, rows = choose_grid(width, height, tile_size=tile_size, max_num_tiles=max_num_tiles)
    return columns * rows + (use_thumbnail and columns * rows > 1)


def split_image(
    image: Image.Image, *, tile_size: int, max_num_tiles: int, use_thumbnail: bool
) -> torch.Tensor:
    """Cut an image into tiles, row by row, with a thumbnail last if there is more than one.

    Args:
        image: An image of any mode `to_rgb` takes.
        tile_size: Side S of a tile in pixels.
        max_num_tiles: Most tiles, without the thumbnail.
        use_thumbnail: Whether several tiles are followed by the whole image as one more tile.

    Returns:
        (n, 3, S, S) float32 on the scale 0..255; bicubic overshoot may leave that range.

    Raises:
        DataError: as `to_rgb`.
    """
    image = to_rgb(image)
    columns, rows = choose_grid(*image.size, tile_size=tile_size, max_num_tiles=max_num_tiles)
    sizes = [(rows * tile_size, columns * tile_size)]
    if use_thumbnail and rows * columns > 1:
        sizes.append((tile_size, tile_size))
    resized, *thumbnails = _resize(image, sizes)
    tiles = resized.reshape(3, rows, tile_size, columns, tile_size).permute(1, 3, 0, 2, 4)
    tiles = tiles.reshape(rows * columns, 3, tile_size, tile_size)
    return torch.cat([tiles, thumbnails[0].unsqueeze(0)]) if thumbnails else tiles


def normalize(tiles: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scale tiles to 0..1, then subtract the mean and divide by the standard deviation.

    Args:
        tiles: (n, 3, S, S) float32 on the scale 0..255.
        mean: Per-channel mean of pixel values in 0..1.
        std: Per-channel standard deviation of pixel values in 0..1.

    Returns:
        (n, 3, S, S) float32.
    """
    mean_tensor = torch.tensor(mean, dtype=torch.float32).reshape(3, 1, 1)
    std_tensor = torch.tensor(std, dtype=torch.float32).reshape(3, 1, 1)
    return (tiles / 255).sub_(mean_tensor).div_(std_tensor)


def open_image(source: Path | str | IO[bytes], *, name: str = "") -> Image.Image:
    """Read an image file, the first frame of an animated one, as upright 8-bit RGB.

    Args:
        source: Path of the file, or its bytes as a stream.
        name: What errors call a stream.

    Raises:
        DataError: if the file is missing, not an image, damaged, or refused by `to_rgb`.
    """
    where = name or source
    try:
        if isinstance(source, Path | str):
            _require_file(Path(source))
        with Image.open(source, formats=_FORMATS) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"{where}: not an image; required one of {', '.join(_FORMATS)}") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # each decoder raises what it likes on damaged files
        raise DataError(f"{where}: the image cannot be read ({first_line(error)})") from None


def _require_file(path: Path) -> None:
    if not path.exists():
        raise DataError("no such image file")
    if not path.is_file():  # a pipe would be waited for
        raise DataError("not a file; required an image")


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, and 16-bit grey is scaled to 8 bits
    (Pillow's own conversion would clip it). An animated image gives its current frame.

    Raises:
        DataError: if the image is empty, has more than `MAX_IMAGE_PIXELS`, or has samples
            without a defined range.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"image: required at least 1 x 1 pixels, got {width} x {height}")
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"image: {width} x {height} pixels are more than the limit of {MAX_IMAGE_PIXELS}; "
            "scale the image down first"
        )
    upright = _turn_upright(image)
    if upright.mode.startswith("I"):
        return _from_16_bit(upright).convert("RGB")
    if upright.mode == "F":
        raise DataError(
            "image: floating-point samples (mode F) have no defined range; save it as 8-bit"
        )
    if upright.has_transparency_data:
        return _on_white(upright)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


# What each value of the EXIF tag Orientation asks for.
_ORIENTATION = 0x0112
_SAYS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turn a photo as its EXIF data say; data that cannot be read say nothing, as for servers."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises on tags of another type than they should have
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    for key in _SAYS_ORIENTATION:  # it is upright now
        upright.info.pop(key, None)
    return upright


@lru_cache
def _candidate_grids(max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    """List every (columns, rows) of at most max_num_tiles tiles, smallest area first.

    The order among equal areas does not matter: two grids of one area are never both nearest.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_num_tiles + 1)
        for rows in range(1, max_num_tiles // columns + 1)
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _resize(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Scale an RGB image to several (height, width); gives (3, height, width) float32 of each.

    A channel at a time, for a large scan is three gigabytes as float32 with all that is made of it.
    """
    resized = [torch.empty(3, *size) for size in sizes]
    for channel in range(3):
        # A copy: torch warns about the read-only memory that Pillow shares.
        samples = torch.from_numpy(np.array(image.getchannel(channel)))
        pixels = samples.float()[None, None]
        for out, size in zip(resized, sizes, strict=True):
            if pixels.shape[2:] != size:
                out[channel] = functional.interpolate(
                    pixels, size=size, mode="bicubic", align_corners=False, antialias=True
                )[0, 0]
            else:
                out[channel] = pixels[0, 0]
    return resized


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (I;16, or mode I as Pillow reads 16-bit PGM) to 8-bit grey."""
    samples = np.asarray(image).astype(np.int32)
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"image: mode {image.mode} is read as 16-bit grey, 0..65535, but samples reach "
            f"{low}..{high}; save it as 8-bit or 16-bit"
        )
    return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    # premultiplied grey has no direct way to RGBA in Pillow
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
