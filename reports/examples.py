"""Questions that the runs answer differently, with the pictures they were asked about.

Nothing is picked by hand: within a suite the questions come in their own order, first those that
some runs get right and others wrong, then those with different wrong answers. The pictures are
not stored with a run; they are drawn again from suite, number and seed, and shown only if the hash
of the item is the one that was asked.
"""

import base64
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from nvvl.calib_data.items import Item, item_hash
from nvvl.reports.metrics import TOKEN_PROBABILITY
from nvvl.reports.run import Answer, RunResult
from nvvl.reports.suites import SUITES

# Enough for a line of print to be legible at the width of a column.
_MAX_SIDE = 640
_MAX_FRAMES = 4
_WEBP_QUALITY = 82

_LEFT_OUT = "\N{MIDDLE DOT}"  # no truth has one: they are ASCII


@dataclass(frozen=True)
class Span:
    """A part of an answer; ``wrong`` where it is not what the truth has."""

    text: str
    wrong: bool


@dataclass(frozen=True, kw_only=True)
class ExampleAnswer:
    """The answer of one run."""

    label: str
    correct: bool
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with the answers of all runs.

    Attributes:
        pictures: as data URLs; empty if this version draws another item than was asked.
    """

    item_id: str
    question: str
    truth: str
    answers: tuple[ExampleAnswer, ...]
    pictures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteExamples:
    """Questions of one suite that the runs answer differently.

    Attributes:
        num_items: questions asked.
        num_sides: questions that some runs get right and others wrong.
        num_different: questions with different answers.
        examples: the first of them.
    """

    suite: str
    num_items: int
    num_sides: int
    num_different: int
    examples: tuple[Example, ...]


def find_examples(runs: Sequence[RunResult], *, per_suite: int) -> list[SuiteExamples]:
    """Return questions of each suite that the runs answer differently.

    Args:
        runs: finished runs over the same items.
        per_suite: most questions to show of a suite.
    """
    settings = runs[0].settings
    return [
        _examples_of(suite, runs, per_suite)
        for suite, metric in zip(settings.suites, settings.metrics, strict=True)
        if metric != TOKEN_PROBABILITY  # no answers
    ]


def mark_errors(answer: str, truth: str) -> tuple[Span, ...]:
    """Split an answer where it agrees with the truth and where it does not.

    What the answer leaves out is marked as a wrong middle dot.
    """
    spans = []
    matcher = difflib.SequenceMatcher(None, truth, answer, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        text = _LEFT_OUT if kind == "delete" else answer[start:end]
        spans.append(Span(text, kind != "equal"))
    return tuple(spans)


def _examples_of(suite: str, runs: Sequence[RunResult], per_suite: int) -> SuiteExamples:
    rows = list(zip(*(run.select(suite) for run in runs), strict=True))
    sides = [row for row in rows if len({answer.correct for answer in row}) > 1]
    different = [row for row in rows if len({answer.answer.strip() for answer in row}) > 1]
    ordered = sides + [row for row in different if row not in sides]
    return SuiteExamples(
        suite=suite,
        num_items=len(rows),
        num_sides=len(sides),
        num_different=len(different),
        examples=tuple(_make_example(row, runs) for row in ordered[:per_suite]),
    )


def _make_example(row: Sequence[Answer], runs: Sequence[RunResult]) -> Example:
    first = row[0]
    return Example(
        item_id=first.item_id,
        question=first.question.replace("<image>", "").replace("<video>", "").strip(),
        truth=first.truth.strip(),
        answers=tuple(
            ExampleAnswer(
                label=run.label,
                correct=answer.correct,
                spans=mark_errors(answer.answer.strip(), first.truth.strip()),
            )
            for run, answer in zip(runs, row, strict=True)
        ),
        pictures=_draw_again(first, runs[0].settings.seed),
    )


def _draw_again(answer: Answer, seed: int) -> tuple[str, ...]:
    suite = SUITES.get(answer.suite)  # None if a suite of another version was asked
    item = None if suite is None else suite.make_item(answer.index, seed)
    if item is None or item_hash(item) != answer.item_sha256:
        return ()
    return tuple(_to_data_url(picture) for picture in _pictures_of(item))


def _pictures_of(item: Item) -> list[Image.Image]:
    pictures = list(item.images)
    for video in item.videos:
        step = max(1, len(video.frames) // _MAX_FRAMES)
        pictures += list(video.frames)[::step][:_MAX_FRAMES]
    return pictures


def _to_data_url(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=_WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
