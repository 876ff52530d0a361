"""The questions a checkpoint is evaluated on.

A suite makes items from numbers: item 17 of seed 0 is the same question about the same pixels for
every model on every machine, so runs can be compared item by item. Each asks one question of one
generated document whose answers were never answers in training; the suites named ``unseen_fonts``
also draw them in font families that no training document has, and ``line_chart`` and ``pie_chart``
are layouts that no training document has. ``continuation`` is text alone, and scored by likelihood.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nvvl.calib_data.documents import make_document
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.items import Item, document_item
from nvvl.errors import DataError
from nvvl.reports.continuation import make_continuation, num_continuations
from nvvl.reports.metrics import TOKEN_PROBABILITY
from nvvl.reports.run import MetricName

# Documents drawn until one has a question of the wanted kind; most have several.
_MAX_DRAWS = 64

# Documents of a seed; the next ones are those of the next seed.
_SEED_BITS = 40
_ITEMS_PER_SEED = 2**_SEED_BITS // _MAX_DRAWS


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A set of questions with one metric.

    Attributes:
        metric: name of a function of `nvvl.reports.metrics`.
        max_new_tokens: longest answer; more than any true answer needs. 0 where the likelihood of
            the true answer is all that is measured.
        make_item: from the number of an item and a seed to the item, whose last message is the
            true answer.
        num_available: most items there are; None for as many as a seed has.
    """

    name: str
    description: str
    metric: MetricName
    max_new_tokens: int
    make_item: Callable[[int, int], Item]
    num_available: int | None = None

    def items(self, num_items: int, *, seed: int = 0) -> Iterator[Item]:
        """Make the first items of the suite, one at a time."""
        return (self.make_item(index, seed) for index in range(num_items))

    @property
    def has_images(self) -> bool:
        """Whether the items show images; a suite is all of one kind."""
        return bool(self.make_item(0, 0).images)

    @property
    def has_videos(self) -> bool:
        """Whether the items show videos."""
        return bool(self.make_item(0, 0).videos)


def find_suites(names: Sequence[str]) -> list[Suite]:
    """Return the suites of these names.

    Raises:
        DataError: if a name is unknown or given twice.
    """
    unknown = sorted(set(names) - set(SUITES))
    if unknown:
        raise DataError(
            f"suites: {', '.join(unknown)} unknown; required any of {', '.join(SUITES)}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"suites: each may be given once, got {', '.join(names)}")
    return [SUITES[name] for name in names]


def require_items(suites: Sequence[Suite], num_items: int) -> None:
    """Refuse to ask for more items than a suite has.

    Raises:
        DataError: naming the suite.
    """
    for suite in suites:
        num_available = suite.num_available or _ITEMS_PER_SEED
        if num_items > num_available:
            raise DataError(
                f"{suite.name}: has {num_available} items, asked for {num_items}; ask for "
                "fewer items, or leave the suite out"
            )


def _make_suites(
    name: str,
    description: str,
    *,
    kind: str,
    transcribe: bool = False,
    metric: MetricName = "exact_match",
) -> list[Suite]:
    """Make a suite of one kind of document, and the same in fonts never trained on.

    Args:
        name: of the first suite.
        description: what is asked.
        kind: of document.
        transcribe: ask for the whole text, not for one value.
        metric: of the answers.
    """
    variants: list[tuple[str, str, Split]] = [
        (name, description, "train"),
        (f"{name}_unseen_fonts", f"{name}, in fonts never trained on", "held_out"),
    ]
    return [
        Suite(
            name=variant,
            description=about.replace("_", " "),
            metric=metric,
            max_new_tokens=768 if transcribe else 96,
            make_item=partial(_ask_document, variant, kind, transcribe, fonts),
        )
        for variant, about, fonts in variants
    ]


def _ask_document(
    name: str, kind: str, transcribe: bool, fonts: Split, index: int, seed: int
) -> Item:
    """Make an item: a document, and one question of the wanted kind about it."""
    for draw in range(_MAX_DRAWS):
        number = (seed << _SEED_BITS) + index * _MAX_DRAWS + draw
        document = make_document(kind, number, split="held_out", fonts=fonts)
        turns = [turn for turn in document.turns if turn[0].startswith("Transcribe") is transcribe]
        if turns:
            turn = random.Random(f"{name}:{number}").choice(turns)
            return document_item(replace(document, turns=(turn,)), f"{name}-{seed}-{index}")
    raise DataError(f"{name}: {_MAX_DRAWS} documents of kind {kind} without a fitting question")


_DOCUMENTS = (
    _make_suites("line", "read a line of text", kind="line"),
    _make_suites("key_value", "give the value of a field of a card", kind="card"),
    _make_suites("table", "give a cell of a table", kind="table"),
    _make_suites("receipt", "give a price, the title or the total", kind="receipt"),
    _make_suites(
        "text",
        "transcribe a paragraph",
        kind="text",
        transcribe=True,
        metric="character_accuracy",
    ),
    _make_suites("page", "give a value of a page of several tiles", kind="page"),
    _make_suites(
        "page_text",
        "transcribe the paragraph of a page of several tiles",
        kind="page",
        transcribe=True,
        metric="character_accuracy",
    ),
    _make_suites("two_pages", "give a value of one of two pages", kind="two_pages"),
    _make_suites("chart", "read a bar chart", kind="chart", metric="relaxed_accuracy"),
    _make_suites("video", "tell what a short video shows, and when", kind="video"),
)
# Kinds of documents that the embedded model never saw, nor calibration unless a spec names them.
_UNSEEN_LAYOUTS = tuple(
    _make_suites(kind, f"read a {kind}, never trained on", kind=kind, metric="relaxed_accuracy")[0]
    for kind in ("line_chart", "pie_chart")
)
_CONTINUATION = Suite(
    name="continuation",
    description="predict the next words of a text",
    metric=TOKEN_PROBABILITY,
    max_new_tokens=0,
    make_item=make_continuation,
    num_available=num_continuations(),
)

SUITES = {
    suite.name: suite
    for suite in (
        *(suite for variants in _DOCUMENTS for suite in variants),
        *_UNSEEN_LAYOUTS,
        _CONTINUATION,
    )
}
DEFAULT_SUITES = ("line", "key_value", "line_unseen_fonts", "key_value_unseen_fonts")
