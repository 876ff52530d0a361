"""Data of the local harness tasks (``lm_eval_tasks/*.yaml``): held-out prose, no Hub.

The same words as the suite ``continuation``, asked the harness's three ways: likelihood of whole
passages, choice between continuations, and a line to be written again. What the harness gives these
functions as keywords is metadata of the run, which they do not need.
"""

import random
from typing import Any

from datasets import Dataset, DatasetDict

from nvvl.calib_data.values import load_list

_CONTEXT_WORDS, _TARGET_WORDS, _PASSAGE_WORDS = 40, 9, 120
_NUM_CHOICES = 4


def prose(**_: Any) -> DatasetDict:
    """Return passages of 120 words, none of which overlap."""
    words = _words()
    return _as_test(
        {"passage": " ".join(words[start : start + _PASSAGE_WORDS])}
        for start in range(0, len(words) - _PASSAGE_WORDS + 1, _PASSAGE_WORDS)
    )


def next_words(**_: Any) -> DatasetDict:
    """Return 40 words each, and four continuations of which the first in the text is the truth."""
    words, step = _words(), _TARGET_WORDS
    starts = range(_CONTEXT_WORDS, len(words) - step + 1, step)
    spans = [" ".join(words[start : start + step]) for start in starts]
    rows = []
    for index, start in enumerate(starts):
        rng = random.Random(f"next_words:{index}")
        others = rng.sample([i for i in range(len(spans)) if i != index], _NUM_CHOICES - 1)
        label = rng.randrange(_NUM_CHOICES)
        choices = [spans[i] for i in others]
        choices.insert(label, spans[index])
        context = " ".join(words[start - _CONTEXT_WORDS : start])
        rows.append({"context": context, "choices": choices, "label": label})
    return _as_test(rows)


def copies(**_: Any) -> DatasetDict:
    """Return runs of nine words to be written again."""
    words, step = _words(), _TARGET_WORDS
    return _as_test(
        {"line": " ".join(words[start : start + step])}
        for start in range(0, len(words) - step + 1, step)
    )


def _as_test(rows: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(list(rows))})


def _words() -> list[str]:
    return " ".join(load_list("prose_held_out.txt")).split()
