import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from nvvl.calib_data.items import item_hash
from nvvl.reports.examples import find_examples, mark_errors
from nvvl.reports.run import Answer, RunResult, Settings
from nvvl.reports.suites import SUITES


def make_answer(index: int, answer: str, truth: str = "abc", sha256: str = "?") -> Answer:
    return Answer(
        suite="line",
        index=index,
        condition="right",
        item_id=f"line-0-{index}",
        item_sha256=sha256,
        question="<image>\nRead the text.",
        truth=truth,
        answer=answer,
        score=float(answer == truth),
        correct=answer == truth,
        cer=0.0,
        anls=1.0,
        nll=0.5,
        kl=None,
        top1=None,
        num_tokens=4,
        num_visual_tokens=4,
    )


def make_run(label: str, answers: list[Answer]) -> RunResult:
    settings = Settings(
        model_sha256=label,
        teacher_sha256=None,
        suites=("line",),
        metrics=("exact_match",),
        num_items=len(answers),
        seed=0,
        batch_size=4,
        gate_suite=None,
        gate_items=0,
        device="cpu",
        dtype="bfloat16",
        max_num_tiles=None,
        pruning_rate=0.0,
        nvvl_version="0",
    )
    return RunResult(
        out=Path(label),
        label=label,
        model=Path(label),
        format=label,
        weights_bytes=1,
        folder_bytes=1,
        settings=settings,
        answers=tuple(answers),
    )


def test_questions_that_change_sides_come_first() -> None:
    before = ["abc", "x", "abc", "abc", "abc"]
    after = ["abc", "y", "abx", "abc", "b"]
    runs = [
        make_run("BF16", [make_answer(i, text) for i, text in enumerate(before)]),
        make_run("FP8", [make_answer(i, text) for i, text in enumerate(after)]),
    ]
    (suite,) = find_examples(runs, per_suite=9)
    assert (suite.num_items, suite.num_sides, suite.num_different) == (5, 2, 3)
    assert [example.item_id for example in suite.examples] == ["line-0-2", "line-0-4", "line-0-1"]
    first = suite.examples[0]
    assert first.question == "Read the text."
    assert [answer.correct for answer in first.answers] == [True, False]
    assert len(find_examples(runs, per_suite=1)[0].examples) == 1


def test_picture_is_shown_only_if_it_is_the_one_that_was_asked() -> None:
    sha256 = item_hash(SUITES["line"].make_item(0, 0))
    asked, changed = make_answer(0, "x", sha256=sha256), make_answer(1, "x", sha256=sha256)
    runs = [make_run("BF16", [asked, changed])]
    runs.append(make_run("FP8", [replace(a, answer="y") for a in (asked, changed)]))
    (suite,) = find_examples(runs, per_suite=2)
    (url,), nothing = (example.pictures for example in suite.examples)
    assert nothing == ()
    data = base64.b64decode(url.removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(data)).size == SUITES["line"].make_item(0, 0).images[0].size


@pytest.mark.parametrize(
    ("answer", "truth", "marked"),
    [
        ("abc", "abc", "abc"),
        ("axc", "abc", "a[x]c"),
        ("ac", "abc", "a[·]c"),
        ("abcd", "abc", "abc[d]"),
        ("", "abc", "[·]"),
    ],
)
def test_marks_what_differs_from_the_truth(answer: str, truth: str, marked: str) -> None:
    spans = mark_errors(answer, truth)
    assert "".join(f"[{s.text}]" if s.wrong else s.text for s in spans) == marked
