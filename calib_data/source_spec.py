"""The kinds of sources a calibration set can be mixed from.

Each is a frozen dataclass whose fields are the keys of a ``[[sources]]`` table. How a source is
read is in ``nvvl.calib_data.mixture``.
"""

from dataclasses import dataclass
from typing import ClassVar

from nvvl.calib_data.documents import KINDS
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.sources import DEFAULT_QUESTION, NUM_NUMBERS, PASSAGE
from nvvl.calib_data.strict import require_choice, require_within
from nvvl.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources have.

    Attributes:
        name: Begins the ids of the items; the kind and a number if empty.
        count: Items to take; all there are if None, where a source can end.
        seed: Which items are taken; that of the set if None.
        answers: Whether items keep the last answer; without it they end with the question.
        domain: What the items are counted as; the source's own word if empty.
    """

    kind: ClassVar[str] = ""
    endless: ClassVar[bool] = False

    name: str = ""
    count: int | None = None
    seed: int | None = None
    answers: bool = True
    domain: str = ""

    def __post_init__(self) -> None:
        if self.count is None and self.endless:
            raise DataError(f"{self.kind}: required count, for this kind of source has no end")
        require_within(1, self.count, f"{self.kind}.count")
        require_within(0, self.seed, f"{self.kind}.seed")
        path = getattr(self, "path", "")  # of those that have one
        if "\0" in path:
            raise DataError(f"{self.kind}.path: required a path, without NUL, got {path!r:.60}")


@dataclass(frozen=True, kw_only=True)
class Documents(Source):
    """Generated documents with exact ground truth.

    Attributes:
        kinds: Kinds of `nvvl.calib_data.documents`, or ``passage``, repeated in this order.
        split: Which strings may be answers; suites ask those of ``held_out``.
        fonts: Which font families are used.
    """

    kind: ClassVar[str] = "documents"
    endless: ClassVar[bool] = True

    kinds: tuple[str, ...] = ()
    split: Split = "train"
    fonts: Split = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, self.count, "documents.count", most=NUM_NUMBERS)
        for kind in self.kinds:
            require_choice(kind, (*KINDS, PASSAGE), "documents.kinds")


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Images below a folder, all asked the same question."""

    kind: ClassVar[str] = "folder"

    path: str
    question: str = DEFAULT_QUESTION


@dataclass(frozen=True, kw_only=True)
class Jsonl(Source):
    """A JSONL file of conversations with images and videos (``nvvl.calib_data.jsonl_files``)."""

    kind: ClassVar[str] = "jsonl"

    path: str


@dataclass(frozen=True, kw_only=True)
class Pdf(Source):
    """Pages of a PDF file, or of all below a folder; their text layer is the answer.

    Attributes:
        dpi: Resolution of the rendered pages.
        pages_per_item: Consecutive pages of one file shown together.
    """

    kind: ClassVar[str] = "pdf"

    path: str
    question: str = "Transcribe the document."
    dpi: int = 110
    pages_per_item: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, self.dpi, "pdf.dpi")
        require_within(1, self.pages_per_item, "pdf.pages_per_item")


@dataclass(frozen=True, kw_only=True)
class VideoFiles(Source):
    """A video file, or all below a folder, sampled as the model is shown them."""

    kind: ClassVar[str] = "video"

    path: str
    question: str = "Describe the video."


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Passages of a plain text file, or of all below a folder; the second half is the answer.

    Attributes:
        words: Words of a passage.
    """

    kind: ClassVar[str] = "text"

    path: str
    words: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(2, self.words, "text.words")


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """Rows of a dataset, streamed with the library ``datasets``.

    Either ``text`` is given, or ``image`` with ``question`` or ``prompt``, or ``messages``.

    Attributes:
        dataset: Name on the Hub, or ``parquet`` or ``json`` with ``data_files``.
        config: Configuration, or subset, of the dataset.
        revision: Branch, tag or commit.
        data_files: Files of the dataset to read; relative to the spec for ``parquet`` and ``json``.
        shuffle: Size of the buffer that rows are shuffled in; 0 keeps their order.
        text: Column of a text; of ``words`` words the second half is the answer.
        image: Column of an image, or of a list of images.
        question: Column of the question.
        prompt: The question itself, where no column has it.
        answer: Column of the answer, a string or a list whose first one is taken.
        messages: Column of ``{"role", "content"}`` messages.
        words: As of ``Text``; a row has one passage, its beginning.
    """

    kind: ClassVar[str] = "hub"
    endless: ClassVar[bool] = True

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    shuffle: int = 0
    text: str | None = None
    image: str | None = None
    question: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    words: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(0, self.shuffle, "hub.shuffle")
        require_within(2, self.words, "hub.words")
        asked = (self.question, self.prompt)
        ways = [self.text is not None, self.messages is not None, any(asked)]
        if sum(ways) != 1 or all(asked):
            raise DataError(
                f"{self.dataset}: required one of text, messages, question and prompt, to say what "
                "a row is"
            )


@dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Conversations whose images lie in tar shards, as in ``nvidia/Nemotron-VLM-Dataset-v2``.

    Attributes:
        dataset: Name on the Hub, or a folder of the same layout relative to the spec.
        subset: Folder with ``SUBSET.jsonl`` and ``media/shard_*.tar``.
        revision: Branch, tag or commit.
        first_shard: Number of the first shard in the order of their names.
    """

    kind: ClassVar[str] = "shards"
    endless: ClassVar[bool] = True

    dataset: str
    subset: str
    revision: str | None = None
    first_shard: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(0, self.first_shard, "shards.first_shard")


SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (Documents, Folder, Jsonl, Pdf, VideoFiles, Text, Hub, Shards)
}
