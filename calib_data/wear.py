"""Wear of generated documents: what scanning, cameras and compression do to a page.

Light gradients, noise, slight blur, JPEG and, rarely, a small rotation; each mild enough that a
person still reads the page at once. Only Pillow and the document's own random generator are
used: `PIL.Image.effect_noise` is not, since it draws from the C library's generator.
"""

import io
import math
import random

from PIL import Image, ImageChops, ImageFilter

from nvvl.calib_data.drawing import Canvas, Glyph

MAX_DEGREES = 1.5


def wear(canvas: Canvas, rng: random.Random) -> tuple[Image.Image, tuple[Glyph, ...]]:
    """Return the image of a canvas with some wear, and its glyphs where they are then."""
    image = canvas.image
    glyphs = tuple(canvas.glyphs)
    if rng.random() < 0.08:
        degrees = rng.uniform(-MAX_DEGREES, MAX_DEGREES)
        image = image.rotate(
            degrees, Image.Resampling.BILINEAR, fillcolor=canvas.palette.background
        )
        glyphs = tuple(_rotate(glyph, degrees, image.size) for glyph in glyphs)
    if rng.random() < 0.3:
        image = _shade(image, rng)
    if rng.random() < 0.12:
        image = _blur(image, rng.randint(2, 6))
    if rng.random() < 0.5:
        image = _add_noise(image, rng)
    if rng.random() < 0.2:
        image = _compress(image, rng.randint(40, 90))
    return image, glyphs


def _rotate(glyph: Glyph, degrees: float, size: tuple[int, int]) -> Glyph:
    """Return the box around a rotated glyph box, inside the image."""
    radians = math.radians(degrees)
    cos, sin = math.cos(radians), math.sin(radians)
    half_width, half_height = size[0] / 2, size[1] / 2
    xs, ys = [], []
    for x in (glyph.x0 - half_width, glyph.x1 - half_width):
        for y in (glyph.y0 - half_height, glyph.y1 - half_height):
            xs.append(x * cos + y * sin + half_width)
            ys.append(y * cos - x * sin + half_height)
    return Glyph(
        glyph.char,
        max(math.floor(min(xs)), 0),
        max(math.floor(min(ys)), 0),
        min(math.ceil(max(xs)), size[0]),
        min(math.ceil(max(ys)), size[1]),
        glyph.size,
    )


def _shade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Darken the image towards one edge, as uneven light does."""
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)))
    strength = rng.randint(10, 45)
    ramp = ramp.point([255 - level * strength // 255 for level in range(256)])
    return ImageChops.multiply(image, ramp.resize(image.size).convert("RGB"))


def _blur(image: Image.Image, strength: int) -> Image.Image:
    """Give each pixel's neighbours a part of its light: 6 is a blur of about 0.6 pixels."""
    corner, side, centre = strength, 3 * strength, 60
    kernel = (corner, side, corner, side, centre, side, corner, side, corner)
    return image.filter(ImageFilter.Kernel((3, 3), kernel))


def _add_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add grey noise of the same spread in light and dark places."""
    amplitude = rng.randint(2, 12)
    # one 128 px tile of noise, repeated: fresh bytes for every pixel would cost more than the text
    tile = Image.frombytes("L", (128, 128), rng.randbytes(128 * 128))
    tile = tile.point([level * 2 * amplitude // 255 for level in range(256)])
    noise = Image.new("L", image.size)
    for x in range(0, image.width, 128):
        for y in range(0, image.height, 128):
            noise.paste(tile, (x, y))
    return ImageChops.add(image, noise.convert("RGB"), offset=-amplitude)


def _compress(image: Image.Image, quality: int) -> Image.Image:
    """Pass the image through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
