"""Whether calibration items overlap with items a model is evaluated on.

Pictures are compared by their edges: in grey, scaled down, the steps from each point to its right
and its lower neighbour, as one vector of length 1. Two pictures are one if these vectors agree at
32 x 32 and at 96 x 96 points (cosine of at least `MIN_COSINE`). Of generated pages scaled by 0.5 to
1.7 and saved as JPEG of quality 30 to 90, this finds 98 to 100 % by kind; of 800,000 pairs of
different bar charts, the kind that looks most alike, it takes none for equal. A picture without
edges, such as a blank page, equals nothing.

Texts are compared by their runs of `RUN_WORDS` words, in lower case without punctuation, as
language models are checked for contamination (arXiv 2005.14165, appendix C, has 13 words too).
Shorter texts, such as the same question about another picture, do not count; a conversation
without pictures that is shorter is compared as a whole.

A crop, a rotation, a translation or a paraphrase is not found.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.text_files import UNSPACED

MIN_COSINE = 0.9
RUN_WORDS = 13

_COARSE, _FINE = 32, 96
_MIN_EDGES = 8.0  # length of a vector before it is scaled, in levels of grey

_WORD = re.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\w)+")
_PLACEHOLDER = re.compile(r"<image>|<video>")

# half precision: vectors of length 1 keep three digits, and a suite takes 41 MB
Edges = NDArray[np.float16]


@dataclass(frozen=True)
class Overlap:
    """A calibration item that is also an evaluation item.

    Attributes:
        item_id: Of the calibration item.
        suite: Name of the evaluation suite.
        other_id: Of the evaluation item.
        kind: What they share: ``picture`` or ``text``.
    """

    item_id: str
    suite: str
    other_id: str
    kind: str


@dataclass
class Fingerprints:
    """Pictures and texts of many items.

    Attributes:
        owners: Item id of each picture.
        pictures: Edges of each picture, coarse and fine.
        texts: Hash of a run of words, to the items that have it.
    """

    owners: list[str] = field(default_factory=list)
    pictures: list[tuple[Edges, Edges]] = field(default_factory=list)
    texts: dict[bytes, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Fingerprints":
        """Take the fingerprints of items."""
        prints = cls()
        for item in items:
            prints.add(item)
        return prints

    def add(self, item: Item) -> None:
        """Take those of one more item; of a video its first and last frame."""
        ends = [frame for video in item.videos for frame in (video.frames[0], video.frames[-1])]
        for picture in (*item.images, *ends):
            coarse, fine = picture_edges(picture, _COARSE), picture_edges(picture, _FINE)
            if coarse is not None and fine is not None:
                self.owners.append(item.item_id)
                self.pictures.append((coarse, fine))
        for text in text_hashes(item):
            self.texts.setdefault(text, []).append(item.item_id)


def find_overlaps(ours: Fingerprints, theirs: Fingerprints, suite: str) -> list[Overlap]:
    """Find calibration items that share a picture or a text with a suite, each once a kind."""
    found: dict[tuple[str, str], Overlap] = {}
    for mine, place in coarse_matches(stack_coarse(ours), stack_coarse(theirs)):
        if _cosine(ours.pictures[mine][1], theirs.pictures[place][1]) >= MIN_COSINE:
            owner = ours.owners[mine]
            overlap = Overlap(owner, suite, theirs.owners[place], "picture")
            found.setdefault((owner, "picture"), overlap)
    for text in sorted(ours.texts.keys() & theirs.texts.keys()):
        for owner in ours.texts[text]:
            overlap = Overlap(owner, suite, theirs.texts[text][0], "text")
            found.setdefault((owner, "text"), overlap)
    return sorted(found.values(), key=lambda overlap: (overlap.item_id, overlap.kind))


def stack_coarse(prints: Fingerprints) -> Edges:
    """Return the coarse edges of every picture: (pictures, 2 * 32 * 32) float16."""
    coarse = [pair[0] for pair in prints.pictures]
    return np.stack(coarse) if coarse else np.empty((0, 2 * _COARSE**2), np.float16)


def coarse_matches(ours: Edges, theirs: Edges) -> NDArray[np.intp]:
    """Find the pictures that agree coarsely: (matches, 2), rows of ``ours`` and of ``theirs``."""
    cosines = ours.astype(np.float32) @ theirs.astype(np.float32).T
    return np.argwhere(cosines >= MIN_COSINE)


def picture_edges(image: Image.Image, side: int) -> Edges | None:
    """Return the steps of grey between neighbours, as a vector of length 1.

    Args:
        image: RGB.
        side: Points a side that the picture is scaled down to.

    Returns:
        (2 * side * side,), or None if there are hardly any.
    """
    # as floats, for rounding would be all that is left of a soft gradient
    grey = np.asarray(
        image.convert("L").convert("F").resize((side + 1, side + 1), Image.Resampling.BILINEAR)
    )
    right = grey[:-1, 1:] - grey[:-1, :-1]
    down = grey[1:, :-1] - grey[:-1, :-1]
    edges = np.concatenate([right.ravel(), down.ravel()])
    length = float(np.linalg.norm(edges))
    return (edges / length).astype(np.float16) if length >= _MIN_EDGES else None


def text_hashes(item: Item) -> set[bytes]:
    """Return hashes of every run of words in an item's turns, or of a short text as a whole.

    Of an item with pictures those of its answers alone: whole benchmarks share instructions.
    """
    shows = bool(item.images or item.videos)
    turns = [_words(m.content) for m in item.messages if m.role == "assistant" or not shows]
    runs = {
        _hash(words[start : start + RUN_WORDS])
        for words in turns
        for start in range(len(words) - RUN_WORDS + 1)
    }
    if not runs and not shows:
        runs.add(_hash([word for words in turns for word in words]))
    return runs


def _cosine(left: Edges, right: Edges) -> float:
    return float(left.astype(np.float32) @ right.astype(np.float32))


def _words(text: str) -> list[str]:
    return _WORD.findall(_PLACEHOLDER.sub(" ", text).lower())


def _hash(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
