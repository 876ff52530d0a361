"""Passages of plain text files: the model is given the first half and answers the second.

Passages are cut one after the other at white space, which inside of them is kept as it stands.
"""

import re
from functools import partial
from pathlib import Path

from nvvl.calib_data.items import Item
from nvvl.calib_data.sources import CONTINUE, PASSAGE, ItemSource, failing_source, list_files
from nvvl.errors import DataError
from nvvl.model.prompt import Message

TEXT_SUFFIXES = (".md", ".rst", ".text", ".txt")

# Characters of scripts that put no spaces between words, each with the marks on it: Thai, Lao,
# Japanese, Chinese. Each counts as a word.
UNSPACED = (
    "(?:[\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ec0-\u0ec6"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u3099\u309a]*)"
)
_WORD = re.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\S)+")


def text_items(path: Path, *, words: int) -> list[ItemSource]:
    """List the passages of a text file, or of those below a folder.

    A file shorter than a passage is one passage; otherwise what is left at its end is not used. A
    file that is no UTF-8 text is one item that cannot be made.

    Args:
        path: File or folder.
        words: Words of a passage, at least 2; a character of a script without spaces is one.

    Raises:
        DataError: if there is no such file or folder, no text file in it, or one cannot be read.
    """
    sources = []
    for name, file in list_files(path, TEXT_SUFFIXES, "text file").items():
        try:
            passages = _cut(_read(file), words, file)
        except DataError as error:
            sources.append(failing_source(name, error))
            continue
        for number, passage in enumerate(passages, start=1):
            item_id = f"{name}#{number}"
            sources.append(ItemSource(item_id, partial(passage_item, passage, item_id)))
    return sources


def passage_item(passage: str, item_id: str, domain: str = PASSAGE) -> Item:
    """Split a text of at least two words in the middle."""
    starts = [match.start() for match in _WORD.finditer(passage)]
    if len(starts) < 2:
        raise DataError(f"{item_id}: required a text of at least 2 words, got {len(starts)}")
    middle = starts[len(starts) // 2]
    messages = (
        Message("user", f"{CONTINUE}\n{passage[:middle].rstrip()}"),
        Message("assistant", passage[middle:].rstrip()),
    )
    return Item(item_id=item_id, messages=messages, domain=domain)


def first_words(text: str, words: int) -> str:
    """Return the beginning of a text, at most so many words."""
    matches = list(_WORD.finditer(text))[:words]
    return text[matches[0].start() : matches[-1].end()] if matches else ""


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: required UTF-8 text ({error})") from None


def _cut(text: str, words: int, file: Path) -> list[str]:
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) < 2:
        raise DataError(f"{file}: required a text of at least 2 words, got {len(spans)}")
    size = min(words, len(spans))
    starts = range(0, len(spans) - size + 1, size)
    return [text[spans[start][0] : spans[start + size - 1][1]] for start in starts]
