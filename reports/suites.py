"""The questions a checkpoint is evaluated on.

A suite makes items from numbers: item 17 of seed 0 is the same question about the same pixels for
every model on every machine, so runs can be compared item by item. Each asks one question of one
generated document whose answers were never answers in training; the suites named ``unseen_fonts``
also draw them in font families that no training document has.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nvvl.calib_data.documents import make_document
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.items import Item, document_item
from nvvl.errors import DataError
from nvvl.reports.metrics import MetricName

# Documents drawn until one has a question of the wanted kind; most have several.
_MAX_DRAWS = 64


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A set of questions with one metric.

    Attributes:
        metric: name of a function of `nvvl.reports.metrics`.
        max_new_tokens: longest answer; more than any true answer needs.
        make_item: from the number of an item and a seed to the item, whose last message is the
            true answer.
    """

    name: str
    description: str
    metric: MetricName
    max_new_tokens: int
    make_item: Callable[[int, int], Item]

    def items(self, num_items: int, *, seed: int = 0) -> Iterator[Item]:
        """Make the first items of the suite, one at a time."""
        return (self.make_item(index, seed) for index in range(num_items))


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


def _make_suite(
    name: str,
    description: str,
    *,
    kind: str,
    transcribe: bool = False,
    metric: MetricName = "exact_match",
    fonts: Split = "train",
) -> Suite:
    """Make a suite of one kind of document.

    Args:
        name: of the suite.
        description: what is asked.
        kind: of document.
        transcribe: ask for the whole text, not for one value.
        metric: of the answers.
        fonts: font families the documents are drawn in.
    """
    return Suite(
        name=name,
        description=description,
        metric=metric,
        max_new_tokens=768 if transcribe else 96,
        make_item=partial(_ask_document, name, kind, transcribe, fonts),
    )


def _ask_document(
    name: str, kind: str, transcribe: bool, fonts: Split, index: int, seed: int
) -> Item:
    """Make an item: a document, and one question of the wanted kind about it."""
    for draw in range(_MAX_DRAWS):
        number = (seed << 40) + index * _MAX_DRAWS + draw
        document = make_document(kind, number, split="held_out", fonts=fonts)
        turns = [turn for turn in document.turns if turn[0].startswith("Transcribe") is transcribe]
        if turns:
            turn = random.Random(f"{name}:{number}").choice(turns)
            return document_item(replace(document, turns=(turn,)), f"{name}-{seed}-{index}")
    raise DataError(f"{name}: {_MAX_DRAWS} documents of kind {kind} without a fitting question")


_ALL = (
    _make_suite("line", "read a line of text", kind="line"),
    _make_suite("key_value", "give the value of a field of a card", kind="card"),
    _make_suite(
        "line_unseen_fonts", "line, in fonts never trained on", kind="line", fonts="held_out"
    ),
    _make_suite(
        "key_value_unseen_fonts", "key_value, in such fonts", kind="card", fonts="held_out"
    ),
    _make_suite("table", "give a cell of a table", kind="table"),
    _make_suite("receipt", "give a price, the title or the total", kind="receipt"),
    _make_suite(
        "text",
        "transcribe a paragraph",
        kind="text",
        transcribe=True,
        metric="character_accuracy",
    ),
    _make_suite("page", "give a value of a page of several tiles", kind="page"),
    _make_suite("two_pages", "give a value of one of two pages", kind="two_pages"),
    _make_suite("chart", "read a bar chart", kind="chart", metric="relaxed_accuracy"),
    _make_suite("video", "tell what a short video shows, and when", kind="video"),
)

SUITES = {suite.name: suite for suite in _ALL}
DEFAULT_SUITES = tuple(suite.name for suite in _ALL[:4])
