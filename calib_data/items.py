"""Items: conversations with their images and videos, as calibration and evaluation use them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from nvvl.calib_data.documents import Document, document_messages
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.video import Video


@dataclass(frozen=True)
class Item:
    """One conversation.

    Attributes:
        item_id: Name of the item, unique within its set.
        messages: The turns; ``<image>`` and ``<video>`` stand for the media, in order.
        images: RGB images.
        domain: What kind of item it is: a kind of document, ``passage``, or ``user``.
    """

    item_id: str
    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    domain: str = ""


def document_item(document: Document, item_id: str) -> Item:
    """Make an item of a generated document: each question a user turn, each answer a reply."""
    return Item(
        item_id=item_id,
        messages=tuple(document_messages(document)),
        images=() if document.video else document.images,
        videos=(document.video,) if document.video else (),
        domain=document.kind,
    )


@contextmanager
def naming_item(item_id: str) -> Iterator[None]:
    """Put the name of an item before what a `DataError` says of it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"item {item_id}: {error}") from None


def item_hash(item: Item) -> str:
    """Return the SHA-256, in hex, of an item's messages, pixels and frame times.

    The id and the domain are not hashed: equal hashes mean equal inputs to the model.
    """
    digest = hashlib.sha256()
    for message in item.messages:
        _add(digest, message.role.encode())
        _add(digest, message.content.encode())
    for image in item.images:
        _add_image(digest, image)
    for video in item.videos:
        _add(digest, f"video {video.fps!r} {list(video.frame_indices)}".encode())
        for frame in video.frames:
            _add_image(digest, frame)
    return digest.hexdigest()


def _add_image(digest: "hashlib._Hash", image: Image.Image) -> None:
    _add(digest, f"image {image.mode} {image.width}x{image.height}".encode())
    _add(digest, image.tobytes())


def _add(digest: "hashlib._Hash", part: bytes) -> None:
    """Hash a part behind its length, so that parts cannot run into each other."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
