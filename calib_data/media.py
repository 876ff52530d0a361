"""Images and video frames of a built set, each stored once under the hash of its pixels.

The name of a file is the SHA-256 of size and RGB samples, so equal pictures are one file, two
builds give the same names, and a picture that was damaged or exchanged is found when it is read.
Files are PNG: lossless, so an item read back is the item that was built.
"""

import hashlib
from pathlib import Path

from PIL import Image

from nvvl.errors import DataError
from nvvl.model.tiling import open_image

FOLDER = "media"

# level 1 of zlib: half again as large as the default and five times as fast on documents
_COMPRESS_LEVEL = 1


def picture_name(image: Image.Image) -> str:
    """Return the SHA-256, in hex, of an RGB image's size and samples."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def save_picture(image: Image.Image, folder: Path) -> str:
    """Store an RGB image below a set's folder unless it is there, and return its name."""
    name = picture_name(image)
    path = picture_path(folder, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG", compress_level=_COMPRESS_LEVEL)
    return name


def read_picture(folder: Path, name: str) -> Image.Image:
    """Read a stored image.

    Raises:
        DataError: if the file is missing, damaged, or has other pixels than its name says.
    """
    path = picture_path(folder, name)
    image = open_image(path)
    if picture_name(image) != name:
        raise DataError(f"{path}: has other pixels than its name says; build the set again")
    return image


def picture_path(folder: Path, name: str) -> Path:
    """Return where a picture of a name lies."""
    return folder / FOLDER / name[:2] / f"{name}.png"
