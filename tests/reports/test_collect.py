import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import nvvl.reports
from nvvl.errors import DataError
from nvvl.reports.collect import collect
from nvvl.reports.render import make_rows, render_json
from nvvl.reports.run import Answer, ImageCondition, RunResult, Settings

SUITES = ("line", "page")
SCHEMA = json.loads(
    (Path(nvvl.reports.__file__).parent / "report.schema.json").read_text(encoding="utf-8")
)


def make_answer(
    suite: str, index: int, correct: bool, *, condition: ImageCondition = "right", kl: float | None
) -> Answer:
    return Answer(
        suite=suite,
        index=index,
        condition=condition,
        item_id=f"{suite}-{index}",
        item_sha256=f"{suite}-{index}-{condition}",
        question="?",
        truth="truth",
        answer="truth" if correct else "troth",
        score=float(correct) if suite == "line" else 0.5 + 0.5 * correct,
        correct=correct,
        cer=0.0 if correct else 0.2,
        anls=1.0,
        nll=0.5,
        kl=kl if condition == "right" else None,
        top1=None if kl is None or condition != "right" else 1.0,
        num_tokens=5,
        num_visual_tokens=4,
    )


def make_run(
    label: str,
    line: Sequence[bool],
    *,
    kl: float | None = None,
    blank: Sequence[bool] = (),
    other: Sequence[bool] = (),
) -> RunResult:
    """Make a run of two suites; the answers to ``page`` are those to ``line`` reversed."""
    gates: list[tuple[ImageCondition, Sequence[bool]]] = [("blank", blank), ("other", other)]
    answers = [make_answer("line", i, ok, kl=kl) for i, ok in enumerate(line)]
    answers += [make_answer("page", i, ok, kl=kl) for i, ok in enumerate(reversed(line))]
    for condition, outcomes in gates:
        answers += [
            make_answer("line", i, ok, condition=condition, kl=kl) for i, ok in enumerate(outcomes)
        ]
    settings = Settings(
        model_sha256=label * 8,
        teacher_sha256=None,
        suites=SUITES,
        metrics=("exact_match", "character_accuracy"),
        num_items=len(line),
        seed=0,
        batch_size=4,
        gate_suite="line" if blank else None,
        gate_items=len(blank),
        device="cpu",
        dtype="bfloat16",
        max_num_tiles=None,
        pruning_rate=0.0,
        nvvl_version="0.1.0",
    )
    return RunResult(
        out=Path("runs") / label,
        label=label,
        model=Path("models") / label,
        format=label,
        weights_bytes=1_000_000,
        folder_bytes=1_200_000,
        settings=settings,
        answers=tuple(answers),
    )


TRUTHS = [True] * 90 + [False] * 10


def test_a_run_is_scored_with_intervals() -> None:
    (score,) = collect([make_run("BF16", TRUTHS)]).runs
    line, page = score.suites["line"], score.suites["page"]
    assert (line.score.estimate, line.score.n) == (0.9, 100)
    assert line.score == line.exact_match
    # Wilson's interval of 90 in 100, by hand: (0.9 + z²/200 ± z sqrt(0.0009 + z²/40000)) / 1.0384
    assert (line.score.low, line.score.high) == pytest.approx((0.82563, 0.94477), abs=1e-5)
    assert page.exact_match.estimate == 0.9
    assert page.score.estimate == pytest.approx(0.95)
    assert page.cer is not None
    assert page.cer.estimate == pytest.approx(0.02)
    assert line.difference is None
    assert score.kl is None
    assert score.verified is None


@pytest.mark.parametrize("nll", [800.0, 3e38])
def test_a_perplexity_that_no_float_holds_is_infinite(nll: float) -> None:
    run = make_run("broken", TRUTHS)
    answers = tuple(replace(answer, nll=nll) for answer in run.answers)
    settings = replace(run.settings, metrics=("token_probability", "character_accuracy"))
    report = collect([replace(run, settings=settings, answers=answers)])
    found = report.runs[0].suites["line"].perplexity
    assert (found.estimate, found.low, found.high, found.n) == (math.inf,) * 3 + (100,)
    rows = {row.name: row.cells for row in make_rows(report)}
    assert rows["line: perplexity"] == (">1e308 [>1e308, >1e308]",)
    values = json.loads(render_json(report), parse_constant=pytest.fail)
    jsonschema.validate(values, SCHEMA)
    expected = {"estimate": None, "low": None, "high": None, "n": 100}
    assert values["runs"][0]["suites"]["line"]["perplexity"] == expected


def test_a_run_equals_itself_exactly() -> None:
    report = collect([make_run("BF16", TRUTHS), make_run("again", TRUTHS, kl=0.0)])
    difference = report.runs[1].suites["line"].difference
    assert difference is not None
    assert (difference.score.estimate, difference.score.low, difference.score.high) == (0, 0, 0)
    assert (difference.num_gained, difference.num_lost, difference.p_value) == (0, 0, 1.0)
    assert difference.recovery_percent == 100
    assert report.runs[1].kl is not None
    assert (report.runs[1].kl.low, report.runs[1].kl.high) == (0, 0)


def test_differences_are_taken_item_by_item() -> None:
    worse = [False] * 9 + [True] * 81 + [True] * 1 + [False] * 9
    report = collect(
        [make_run("BF16", TRUTHS), make_run("NVFP4", worse, kl=0.25)], verified={"NVFP4": True}
    )
    score = report.runs[1]
    difference = score.suites["line"].difference
    assert difference is not None
    assert (difference.num_gained, difference.num_lost) == (1, 9)
    assert difference.score.estimate == pytest.approx(-0.08)
    assert difference.score.low < difference.score.high < 0
    assert difference.p_value == pytest.approx(22 / 1024)
    assert difference.recovery_percent == pytest.approx(100 * 82 / 90)
    assert score.kl is not None
    assert (score.kl.estimate, score.kl.n) == (0.25, 200)
    assert score.verified is True
    assert report.runs[0].verified is None


@pytest.mark.parametrize(
    ("num_blank", "num_other", "passed"),
    [
        (0, 0, True),
        (12, 0, True),
        (18, 0, False),  # 2 of 20 lost: p = 0.5
        (0, 18, False),
        (20, 20, False),
    ],
)
def test_the_image_gate_needs_the_image_to_matter(
    num_blank: int, num_other: int, passed: bool
) -> None:
    run = make_run(
        "BF16",
        TRUTHS,
        blank=[i < num_blank for i in range(20)],
        other=[i < num_other for i in range(20)],
    )
    gate = collect([run]).runs[0].gate
    assert gate is not None
    assert gate.passed is passed
    assert (gate.right.estimate, gate.right.n) == (1.0, 20)
    assert (gate.blank.estimate, gate.other.estimate) == (num_blank / 20, num_other / 20)


def test_the_gate_of_a_suite_without_exact_answers_goes_by_its_score() -> None:
    run = make_run("BF16", [False] * 20, blank=[False] * 20, other=[False] * 20)
    scores = {"right": 0.9, "blank": 0.1, "other": 0.1}
    for same, passed in ((False, True), (True, False)):
        answers = tuple(
            replace(answer, score=0.5 if same else scores[answer.condition])
            for answer in run.answers
        )
        settings = replace(run.settings, metrics=("character_accuracy", "character_accuracy"))
        gate = collect([replace(run, settings=settings, answers=answers)]).runs[0].gate
        assert gate is not None
        assert gate.passed is passed


def test_the_gate_fails_a_model_that_is_better_without_the_image() -> None:
    run = make_run("BF16", [False] * 20, blank=[True] * 20, other=[False] * 20)
    gate = collect([run]).runs[0].gate
    assert gate is not None
    assert gate.p_blank < 0.05
    assert not gate.passed


def test_runs_over_different_items_are_refused() -> None:
    first, second = make_run("BF16", TRUTHS), make_run("FP8", TRUTHS)
    changed = replace(second.answers[3], item_sha256="another image")
    second = replace(second, answers=(*second.answers[:3], changed, *second.answers[4:]))
    with pytest.raises(DataError, match=r"FP8: 1 items differ .*first line 3; evaluate both"):
        collect([first, second])


def test_runs_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="20 items differ"):
        collect([make_run("BF16", TRUTHS), make_run("FP8", TRUTHS[:90])])


def test_two_runs_cannot_share_a_label() -> None:
    with pytest.raises(DataError, match="two runs are labelled FP8"):
        collect([make_run("FP8", TRUTHS), make_run("FP8", TRUTHS)])


def test_a_report_needs_a_run() -> None:
    with pytest.raises(DataError, match="at least one run"):
        collect([])
