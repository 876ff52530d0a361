"""Whether calibration items overlap with items a model is evaluated on.

Pictures are compared by their edges: in grey, scaled down, the steps from each point to its right
and its lower neighbour, as one vector of length 1. Two pictures are one if these vectors agree at
32 x 32 points (cosine of at least `MIN_COARSE`) and at 96 x 96 (`MIN_FINE`). Of generated pages,
scaled by 0.5 to 1.7 and saved as JPEG of quality 30 to 90, this finds 93 to 100 % by kind; of
800,000 pairs of different bar charts, the kind that looks most alike, it takes about one for equal.
A picture without edges, such as a blank page, equals nothing.

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

MIN_COARSE = 0.9
MIN_FINE = 0.8
RUN_WORDS = 13

_COARSE, _FINE = 32, 96
_MIN_EDGES = 8.0  # length of a vector before it is scaled, in levels of grey

_WORD = re.compile(r"\w+")
_PLACEHOLDER = re.compile(r"<image>|<video>")

Edges = NDArray[np.float32]


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
        texts: Hash of a run of words, to the first item that has it.
    """

    owners: list[str] = field(default_factory=list)
    pictures: list[tuple[Edges, Edges]] = field(default_factory=list)
    texts: dict[bytes, str] = field(default_factory=dict)

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
            self.texts.setdefault(text, item.item_id)


def find_overlaps(ours: Fingerprints, theirs: Fingerprints, suite: str) -> list[Overlap]:
    """Find calibration items that share a picture or a text with a suite, each once a kind."""
    found: dict[tuple[str, str], Overlap] = {}
    if ours.pictures and theirs.pictures:
        coarse = np.stack([pair[0] for pair in ours.pictures])
        others = np.stack([pair[0] for pair in theirs.pictures])
        for mine, place in np.argwhere(coarse @ others.T >= MIN_COARSE):
            if float(ours.pictures[mine][1] @ theirs.pictures[place][1]) >= MIN_FINE:
                owner = ours.owners[mine]
                overlap = Overlap(owner, suite, theirs.owners[place], "picture")
                found.setdefault((owner, "picture"), overlap)
    for text, owner in ours.texts.items():
        if text in theirs.texts:
            overlap = Overlap(owner, suite, theirs.texts[text], "text")
            found.setdefault((owner, "text"), overlap)
    return sorted(found.values(), key=lambda overlap: (overlap.item_id, overlap.kind))


def picture_edges(image: Image.Image, side: int) -> Edges | None:
    """Return the steps of grey between neighbours, as a vector of length 1.

    Args:
        image: RGB.
        side: Points a side that the picture is scaled down to.

    Returns:
        (2 * side * side,) float32, or None if there are hardly any.
    """
    small = image.convert("L").resize((side + 1, side + 1), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float32)
    right = grey[:-1, 1:] - grey[:-1, :-1]
    down = grey[1:, :-1] - grey[:-1, :-1]
    edges = np.concatenate([right.ravel(), down.ravel()])
    length = float(np.linalg.norm(edges))
    return edges / np.float32(length) if length >= _MIN_EDGES else None


def text_hashes(item: Item) -> set[bytes]:
    """Return hashes of every run of words in an item's turns, or of a short text as a whole."""
    turns = [_words(message.content) for message in item.messages]
    runs = {
        _hash(words[start : start + RUN_WORDS])
        for words in turns
        for start in range(len(words) - RUN_WORDS + 1)
    }
    if not runs and not item.images and not item.videos:
        runs.add(_hash([word for words in turns for word in words]))
    return runs


def _words(text: str) -> list[str]:
    return _WORD.findall(_PLACEHOLDER.sub(" ", text).lower())


def _hash(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
