"""What the embedded model reads, by size of print and by what is printed: the tables of its card.

    python -m nvvl.tools.embedded_model.strata embedded [--items 2000] [--seed 1]

Asks held-out lines and cards, one question a document. With another seed than 0 they are not those
of the suites `line` and `key_value`, so whoever trains on what this shows can still measure.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvvl.calib_data.documents import Document, make_document
from nvvl.calib_data.forms import TITLE, ask_value
from nvvl.calib_data.items import document_item
from nvvl.calib_data.texts import TRANSCRIBE
from nvvl.calib_data.values import load_list
from nvvl.calib_data.words import load_fields
from nvvl.model.load import load_model, resolve_model
from nvvl.model.processor import Processor
from nvvl.reports.compare import wilson_interval
from nvvl.reports.measure import Panel
from nvvl.reports.metrics import exact_match
from nvvl.reports.question import prepare_question

BATCH_SIZE = 64
WINDOW = 4 * BATCH_SIZE
MAX_NEW_TOKENS = 96
LARGEST = 28  # px; print of this size and more is counted together


@dataclass(frozen=True)
class Reading:
    """One question about one document, and whether it was answered exactly.

    Attributes:
        size: of the answer's print, in pixels.
    """

    question: str
    truth: str
    size: int
    is_right: bool


def read(model: Path, kind: str, num_items: int, seed: int) -> Iterator[Reading]:
    """Ask one question about each of ``num_items`` held-out documents of a kind."""
    processor = Processor.from_folder(model)
    panel = Panel([load_model(model)], processor)
    for start in range(0, num_items, WINDOW):
        numbers = range(start, min(start + WINDOW, num_items))
        documents = [one_question(kind, (seed << 40) + number) for number in numbers]
        questions = [
            prepare_question(document_item(document, f"{kind}-{number}"), processor)
            for number, document in zip(numbers, documents, strict=True)
        ]
        (responses,) = panel.ask(questions, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
        for document, response in zip(documents, responses, strict=True):
            question, truth = document.turns[0]
            is_right = exact_match(response.text, truth) == 1
            yield Reading(question, truth, print_size(document), is_right)


def one_question(kind: str, number: int) -> Document:
    """Return a held-out document with one of its questions, not that for the whole text."""
    document = make_document(kind, number, split="held_out")
    turns = [turn for turn in document.turns if turn[0] != TRANSCRIBE]
    return replace(document, turns=(random.Random(number).choice(turns),))


def print_size(document: Document) -> int:
    """Return the size in pixels at which the answer to the first question is printed."""
    question, answer = document.turns[0]
    glyphs = document.glyphs[0]
    printed = "".join(glyph.char for glyph in glyphs)
    wanted = answer.replace(" ", "")
    # titles are drawn first, and values may be part of one
    place = printed.index(wanted) if question == TITLE else printed.rindex(wanted)
    return glyphs[place].size


def size_stratum(reading: Reading) -> str:
    """Name the two sizes that a print's size is counted with."""
    if reading.size >= LARGEST:
        return f"{LARGEST} px and more"
    low = reading.size // 2 * 2
    return f"{low} to {low + 1} px"


def value_stratum(reading: Reading) -> str:
    """Name the kind of a card's value."""
    if reading.question == TITLE:
        return "title"
    return _kinds()[reading.question]


def line_stratum(reading: Reading) -> str:
    """Name what a line consists of."""
    chars = set(reading.truth)
    if chars & set("&+=*<>_~|\\^[]{}\"'`"):
        return "with rare signs"
    if not any(char.isalpha() for char in chars):
        return "digits"
    if any(char.isdigit() or char in "@/$%#" for char in chars):
        return "letters and digits"
    words = {word.strip(".,;:!?").lower() for word in reading.truth.split()}
    return "words" if words <= _known_words() else "letters, names"


@cache
def _kinds() -> dict[str, str]:
    """Return the kind of value that each question about a card asks for."""
    return {ask_value(key): kind for key, kind in load_fields()}


@cache
def _known_words() -> frozenset[str]:
    return frozenset(load_list("words.txt"))


def tabulate(
    readings: Sequence[Reading], stratum: Callable[[Reading], str]
) -> list[tuple[str, int, int]]:
    """Count readings, and right ones, by stratum.

    Returns:
        Rows of stratum, readings and right ones, in the order of the names.
    """
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for reading in readings:
        count = counts[stratum(reading)]
        count[0] += 1
        count[1] += reading.is_right
    return [(name, total, right) for name, (total, right) in sorted(counts.items())]


def print_table(title: str, rows: Sequence[tuple[str, int, int]]) -> None:
    """Print exact match with its 95 % interval."""
    table = Table(title=title)
    for heading in ("", "n", "exact match, %", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, total, right in rows:
        share = wilson_interval(right, total)
        interval = f"{100 * share.low:.1f} to {100 * share.high:.1f}"
        table.add_row(name, str(total), f"{100 * share.estimate:.1f}", interval)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint folder, or the word: embedded")
    parser.add_argument("--items", type=int, default=2000, help="documents of each kind")
    parser.add_argument("--seed", type=int, default=1, help="which documents are asked")
    arguments = parser.parse_args()
    model = resolve_model(arguments.model)
    contents = {"line": line_stratum, "card": value_stratum}
    for kind, content in contents.items():
        readings = list(read(model, kind, arguments.items, arguments.seed))
        print_table(f"{kind}, by size of print", tabulate(readings, size_stratum))
        print_table(f"{kind}, by content", tabulate(readings, content))


if __name__ == "__main__":
    main()
