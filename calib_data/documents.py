"""Generated documents with exact ground truth: the pages that models are calibrated and tested on.

A document follows from its kind, its seed and its split alone, the same pixels on every machine:
all choices come from one random generator seeded with a string, fonts and words are bundled.
``split`` governs strings (see `nvvl.calib_data.words`), ``fonts`` the font families, so reading
can be measured on strings never seen, and on fonts never seen, apart.

Nothing here imitates handwriting, photographs or scripts other than Latin.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from PIL import Image

from nvvl.calib_data.charts import draw_chart
from nvvl.calib_data.drawing import Glyph, Split
from nvvl.calib_data.forms import draw_card, draw_scrambled_card
from nvvl.calib_data.line_charts import draw_line_chart
from nvvl.calib_data.pages import draw_page, draw_two_pages
from nvvl.calib_data.pie_charts import draw_pie_chart
from nvvl.calib_data.tables import draw_receipt, draw_table
from nvvl.calib_data.texts import (
    Drawn,
    Source,
    draw_line,
    draw_lines,
    draw_scrambled_lines,
    draw_text,
)
from nvvl.calib_data.videos import FPS, draw_video
from nvvl.calib_data.wear import wear
from nvvl.calib_data.words import Strings
from nvvl.errors import DataError
from nvvl.model.prompt import Message
from nvvl.model.video import Video


@dataclass(frozen=True)
class Document:
    """A generated document.

    Attributes:
        kind: One of `KINDS`.
        images: Pages, RGB; for a video its frames.
        turns: Questions with their exact answers, printable ASCII with newlines.
        glyphs: Per image, the characters on it and the pixels they cover.
        video: The frames with their times, if the document is a video.
    """

    kind: str
    images: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]
    glyphs: tuple[tuple[Glyph, ...], ...]
    video: Video | None = None


_LAYOUTS: dict[str, Callable[[Source], Drawn]] = {
    "line": draw_line,
    "lines": draw_lines,
    "card": draw_card,
    "table": draw_table,
    "receipt": draw_receipt,
    "text": draw_text,
    "page": draw_page,
    "two_pages": draw_two_pages,
    "chart": draw_chart,
    "video": draw_video,
    "line_chart": draw_line_chart,
    "pie_chart": draw_pie_chart,
    "scrambled_lines": draw_scrambled_lines,
    "scrambled_card": draw_scrambled_card,
}
KINDS = tuple(_LAYOUTS)


def make_document(kind: str, seed: int, *, split: Split, fonts: Split = "train") -> Document:
    """Generate one document.

    Args:
        kind: One of `KINDS`.
        seed: Any integer; each gives another document.
        split: Which strings may occur as answers.
        fonts: Which font families may occur.

    Raises:
        DataError: if kind, split or fonts is none of those there are.
    """
    if kind not in _LAYOUTS:
        raise DataError(f"document kind: required one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("split", split), ("fonts", fonts)):
        if value not in get_args(Split):
            raise DataError(f"document {name}: required train or held_out, got {value!r}")
    rng = random.Random(f"{kind}:{split}:{seed}")
    drawn = _LAYOUTS[kind](Source(rng, Strings(rng, split), fonts))
    # one generator for a page, the same one anew for each frame: what stands still stays still
    wear_seed = rng.getrandbits(64)
    worn = [
        wear(canvas, random.Random(wear_seed) if drawn.is_video else rng)
        for canvas in drawn.canvases
    ]
    images = tuple(image for image, _ in worn)
    return Document(
        kind=kind,
        images=images,
        turns=tuple(drawn.turns),
        glyphs=tuple(glyphs for _, glyphs in worn),
        video=Video(images, FPS, tuple(range(len(images)))) if drawn.is_video else None,
    )


def document_messages(document: Document) -> list[Message]:
    """Return every question and answer, with placeholders of the media in the first question."""
    media = "<video>\n" if document.video else "<image>\n" * len(document.images)
    messages: list[Message] = []
    for question, answer in document.turns:
        messages += [Message("user", media + question), Message("assistant", answer)]
        media = ""
    return messages
