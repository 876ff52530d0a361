"""From one source of a spec to the items that are tried for it, in order.

Of a source that can be listed, `count` items are drawn by the seed, and the rest stands behind them
in case one is bad or too long; a stream is taken as it comes.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from nvvl.calib_data.hub import hub_items
from nvvl.calib_data.items import Item
from nvvl.calib_data.jsonl_files import jsonl_items
from nvvl.calib_data.listing import MIXTURE
from nvvl.calib_data.pdf_files import pdf_items
from nvvl.calib_data.shards import shard_items
from nvvl.calib_data.source_spec import (
    Documents,
    Folder,
    Hub,
    Jsonl,
    Pdf,
    Shards,
    Source,
    Text,
    VideoFiles,
)
from nvvl.calib_data.sources import ItemSource, folder_items, generated_item, video_items
from nvvl.calib_data.text_files import text_items

# (place in the source, item)
Candidate = tuple[int, ItemSource]


def list_candidates(source: Source, *, seed: int, base: Path) -> Iterator[Candidate]:
    """List what is tried for a source, without reading pixels.

    Args:
        source: One source of a spec.
        seed: The set's, for a source without its own.
        base: Folder that paths of the spec are relative to.

    Raises:
        DataError: if a file, folder or dataset is missing or cannot be read; of a stream, what is
            behind its beginning is met when it is read.
    """
    seed = seed if source.seed is None else source.seed
    listed = _list(source, seed, base)
    if not isinstance(listed, Sequence):
        return enumerate(listed)
    order = list(range(len(listed)))
    if source.count is not None:
        random.Random(seed).shuffle(order)
    return ((place, listed[place]) for place in order)


def finish_item(source: Source, item: Item) -> Item:
    """Give an item of a source its place in the set: id, domain, and the last answer or not.

    What of a file name is no UTF-8 is escaped, for tables hold text.
    """
    item_id = f"{source.name}/{item.item_id}".encode(errors="backslashreplace").decode()
    messages = item.messages
    if not source.answers and messages[-1].role == "assistant":
        messages = messages[:-1]
    return replace(
        item,
        item_id=item_id,
        messages=messages,
        domain=source.domain or item.domain or source.name,
    )


def _list(source: Source, seed: int, base: Path) -> Iterable[ItemSource]:
    match source:
        case Documents():
            return _documents(source, seed)
        case Folder():
            return folder_items(base / source.path, source.question)
        case Jsonl():
            return jsonl_items(base / source.path, keep_bad=True)
        case Pdf():
            return pdf_items(
                base / source.path,
                question=source.question,
                dpi=source.dpi,
                pages_per_item=source.pages_per_item,
            )
        case VideoFiles():
            return video_items(base / source.path, source.question)
        case Text():
            return text_items(base / source.path, words=source.words)
        case Hub():
            return hub_items(source, seed=seed, base=base)
        case Shards():
            return shard_items(source, base=base)
    raise AssertionError(f"no reader for {source.kind}")


def _documents(source: Documents, seed: int) -> Iterator[ItemSource]:
    kinds = source.kinds or MIXTURE
    for index in count():
        kind = kinds[index % len(kinds)]
        yield generated_item(kind, index, seed=seed, split=source.split, fonts=source.fonts)
