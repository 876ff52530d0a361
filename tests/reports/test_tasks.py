"""Tasks of the harness, compared item by item: against numbers worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nvvl.errors import DataError
from nvvl.reports.compare import bootstrap_ratio
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.harness_text import make_task_rows, name_metric, task_table
from nvvl.reports.tasks import TaskDifference, compare_tasks

MakeRun = Callable[..., HarnessRun]

# Of 100 items the model gets 2 that the baseline does not, and loses 10.
BEFORE = [1.0] * 60 + [0.0] * 40
AFTER = [1.0] * 50 + [0.0] * 10 + [1.0] * 2 + [0.0] * 38


def compare(*runs: HarnessRun, metric: int = 0) -> TaskDifference:
    """Return how the last run differs from the first in one metric."""
    (task,) = compare_tasks(runs, runs[0].label)
    assert task.metrics[metric].scores[runs[0].label].difference is None
    difference = task.metrics[metric].scores[runs[-1].label].difference
    assert difference is not None
    return difference


def test_right_and_wrong_items_are_compared_in_pairs(make_harness_run: MakeRun) -> None:
    found = compare(
        make_harness_run("BF16", {"acc": BEFORE}), make_harness_run("NVFP4", {"acc": AFTER})
    )
    assert (found.num_gained, found.num_lost) == (2, 10)
    # McNemar, exact: 2 (1 + 12 + 66) / 2^12
    assert found.p_value == pytest.approx(158 / 4096)
    assert found.score.estimate == pytest.approx(-0.08)
    # Standard error sqrt((0.12 - 0.08²) / 100) = 0.0337; normal, and means are steps of 0.01.
    assert found.score.low == pytest.approx(-0.08 - 1.96 * 0.0337, abs=0.01)
    assert found.score.high == pytest.approx(-0.08 + 1.96 * 0.0337, abs=0.01)
    assert found.score.n == 100


def test_interval_is_that_of_a_binomial_by_hand(make_harness_run: MakeRun) -> None:
    # One of 20 items is lost. Drawn again, it comes B(20, 1/20) times: P(0) = 0.358,
    # P(at most 2) = 0.925 and P(at most 3) = 0.984, so 95 % lie within 0 and 3 of 20.
    after = [0.0, *[1.0] * 19]
    found = compare(
        make_harness_run("BF16", {"acc": [1.0] * 20}), make_harness_run("NVFP4", {"acc": after})
    )
    assert found.score.estimate == pytest.approx(-0.05)
    assert (found.score.low, found.score.high) == pytest.approx((-0.15, 0.0))
    assert found.p_value == 1.0


def test_scores_between_0_and_1_have_no_mcnemar_test(make_harness_run: MakeRun) -> None:
    found = compare(
        make_harness_run("BF16", {"f1": [0.5, 1.0]}), make_harness_run("FP8", {"f1": [0.5, 0.0]})
    )
    assert found.score.estimate == pytest.approx(-0.5)
    assert (found.num_gained, found.num_lost, found.p_value) == (None, None, None)


@pytest.mark.parametrize(
    ("aggregation", "numbers"),
    [
        # Log-likelihoods of 1 and 3 words: -1 and -3 before, -2 and -4 after. Drawn again, the
        # first item comes twice (1 in 4), or the second (1 in 4), or each once.
        ("weighted_perplexity", (math.exp(1.5), math.exp(1), math.exp(2), math.exp(4 / 3))),
        ("bits_per_byte", (1.5 / math.log(2), 1 / math.log(2), 2 / math.log(2), 4 / math.log(8))),
    ],
)
def test_perplexities_are_compared_over_all_words(
    aggregation: str, numbers: tuple[float, ...], make_harness_run: MakeRun
) -> None:
    after, before, first, second = numbers
    known = {"ppl": aggregation}
    found = compare(
        make_harness_run("BF16", {"ppl": [(-1.0, 1.0), (-3.0, 3.0)]}, aggregations=known),
        make_harness_run("FP8", {"ppl": [(-2.0, 1.0), (-4.0, 3.0)]}, aggregations=known),
    )
    assert found.score.estimate == pytest.approx(after - before)
    assert (found.score.low, found.score.high) == pytest.approx((second - before, first - before))
    assert found.p_value is None


def test_bits_per_byte_agree_with_a_ratio_of_differences(make_harness_run: MakeRun) -> None:
    weights = [float(3 + i % 5) for i in range(40)]
    before = [(-2.0 * w - i % 3, w) for i, w in enumerate(weights)]
    after = [(-2.1 * w - i % 4, w) for i, w in enumerate(weights)]
    known = {"bits": "bits_per_byte"}
    found = compare(
        make_harness_run("BF16", {"bits": before}, aggregations=known),
        make_harness_run("FP8", {"bits": after}, aggregations=known),
    )
    changes = [-(a - b) / math.log(2) for (b, _), (a, _) in zip(before, after, strict=True)]
    expected = bootstrap_ratio(changes, weights)  # the same draws
    assert found.score.estimate == pytest.approx(expected.estimate)
    assert (found.score.low, found.score.high) == pytest.approx((expected.low, expected.high))


def test_perplexity_weighs_items_alike(make_harness_run: MakeRun) -> None:
    known = {"perplexity": "perplexity"}
    found = compare(
        make_harness_run("BF16", {"perplexity": [-1.0, -3.0]}, aggregations=known),
        make_harness_run("FP8", {"perplexity": [-2.0, -4.0]}, aggregations=known),
    )
    assert found.score.estimate == pytest.approx(math.exp(3) - math.exp(2))


@pytest.mark.parametrize(
    ("aggregation", "scores"),
    [
        (None, [1.0, 0.0]),
        ("a later one", [1.0, 0.0]),
        ("mean", [1.0, math.nan]),
        ("mean", [1.0, 1e308]),
        ("mean", []),
        ("bits_per_byte", [(-1.0, 0.0), (-1.0, 2.0)]),
        ("perplexity", [-1e5, -1e6]),
    ],
    ids=[
        *("of no single items", "unknown", "not a number", "beyond sums", "no items"),
        *("no weight", "infinite"),
    ],
)
def test_no_difference_is_taken_where_there_is_none(
    aggregation: str | None, scores: list[Any], make_harness_run: MakeRun
) -> None:
    runs = [
        make_harness_run(label, {"acc": scores}, aggregations={"acc": aggregation})
        for label in ("BF16", "FP8")
    ]
    (task,) = compare_tasks(runs, "BF16")
    assert task.metrics[0].scores["FP8"].difference is None
    assert task.metrics[0].scores["FP8"].value == 0.5


def test_value_that_is_not_finite_is_null(make_harness_run: MakeRun) -> None:
    run = make_harness_run("BF16", {"acc": [1.0]})
    (result,) = run.results
    metric = replace(result.metrics[0], value=math.nan, stderr=math.nan)
    (task,) = compare_tasks(
        [replace(run, tasks={"arc": (replace(result, metrics=(metric,)),)})], ""
    )
    assert (task.metrics[0].scores["BF16"].value, task.metrics[0].scores["BF16"].stderr) == (
        None,
        None,
    )


def test_a_task_that_the_baseline_lacks_has_no_difference(make_harness_run: MakeRun) -> None:
    tasks = compare_tasks(
        [
            make_harness_run("BF16", {"acc": [1.0, 0.0]}, task="arc"),
            make_harness_run("FP8", {"acc": [1.0, 0.0]}, task="gsm8k"),
        ],
        "BF16",
    )
    assert [(task.task, list(task.outs)) for task in tasks] == [
        ("arc", ["BF16"]),
        ("gsm8k", ["FP8"]),
    ]
    assert tasks[1].metrics[0].scores["FP8"].difference is None


def test_tasks_of_one_label_may_come_from_several_folders(make_harness_run: MakeRun) -> None:
    runs = [
        make_harness_run(label, {"acc": [1.0, 0.0]}, task=task, settings={"num_fewshot": shots})
        for task, shots in (("arc", 25), ("gsm8k", 5))
        for label in ("BF16", "FP8")
    ]
    tasks = compare_tasks(runs, "BF16")
    assert [task.task for task in tasks] == ["arc", "gsm8k"]
    assert all(task.metrics[0].scores["FP8"].difference is not None for task in tasks)


def test_one_task_twice_under_one_label_is_refused(make_harness_run: MakeRun) -> None:
    run = make_harness_run("BF16", {"acc": [1.0]})
    with pytest.raises(DataError, match="lm/BF16: arc of BF16 is in lm/BF16 too; give one"):
        compare_tasks([run, run], "BF16")


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"limit": 2}, {}, r"--limit 2 \(there none\); run both with the same settings"),
        ({"chat": True, "dtype": "float32"}, {}, r"--chat yes \(there no\), dtype float32 \("),
        ({"max_length": 512}, {}, r"--max-length 512 \(there 4096\)"),
        ({"lm_eval_version": "0.5"}, {}, r"lm eval version 0.5 \(there 0.4.13\)"),
        ({}, {"num_fewshot": 5}, r"--fewshot 5 \(there 0\)"),
        ({}, {"version": "2.0"}, r"version 2.0 \(there 1.0\)"),
    ],
)
def test_other_settings_are_refused_by_name(
    settings: dict[str, Any], changes: dict[str, Any], message: str, make_harness_run: MakeRun
) -> None:
    first = make_harness_run("BF16", {"acc": [1.0, 0.0]})
    second = make_harness_run("FP8", {"acc": [1.0, 0.0]}, settings=settings, **changes)
    with pytest.raises(DataError, match=f"lm/FP8: arc was not run as in lm/BF16: {message}"):
        compare_tasks([first, second], "BF16")


def test_where_and_how_fast_a_model_ran_may_differ(make_harness_run: MakeRun) -> None:
    other = {"batch_size": 8, "device": "cuda", "tasks_folder": "mine"}
    found = compare(
        make_harness_run("BF16", {"acc": [1.0]}),
        make_harness_run("FP8", {"acc": [1.0]}, settings=other),
    )
    assert found.score.estimate == 0


def test_other_items_are_refused(make_harness_run: MakeRun) -> None:
    first, second = (make_harness_run(label, {"acc": [1.0] * 3}) for label in ("BF16", "FP8"))
    items = second.items["arc"]
    changed = replace(second, items={"arc": (items[0], replace(items[1], sha256="x"), items[2])})
    with pytest.raises(
        DataError, match="lm/FP8: 1 items of arc differ from those in lm/BF16, first 1"
    ):
        compare_tasks([first, changed], "BF16")
    with pytest.raises(DataError, match="lm/FP8: 2 items of arc differ"):
        compare_tasks([first, replace(second, items={"arc": items[:1]})], "BF16")


def test_rows_have_values_differences_and_tests(make_harness_run: MakeRun) -> None:
    runs = [
        make_harness_run("BF16", {"acc": BEFORE}, settings={"limit": 100, "chat": True}),
        make_harness_run("NVFP4", {"acc": AFTER}, settings={"limit": 100, "chat": True}),
    ]
    tasks = compare_tasks(runs, "BF16")
    (rows,) = make_task_rows(tasks, ["BF16", "NVFP4", "none"], "BF16")
    assert rows.about == "first 100 items, 0-shot, chat template, version 1.0"
    assert rows.rows == (
        ("acc ↑", ("0.5000 ± 0.1250", "0.5000 ± 0.1250", "-")),
        ("- minus BF16", ("-", "-0.0800 [-0.1500, -0.0200]", "-")),
        ("- McNemar's p", ("-", "0.039 (2 gained, 10 lost)", "-")),
    )
    assert task_table(tasks, ["BF16", "NVFP4"], "BF16").title == "lm-evaluation-harness 0.4.13"
    assert make_task_rows(tasks, ["none"], "BF16") == []


@pytest.mark.parametrize(
    ("counts", "labels", "expected"),
    [
        ((250, 250), ["BF16", "FP8"], ", 250 requests cut to --max-length 4096 (raise it)"),
        (
            (250, 1300),
            ["BF16", "FP8"],
            ", 250 to 1,300 requests cut to --max-length 4096 (raise it)",
        ),
        ((0, 1300), ["BF16"], ""),
    ],
)
def test_cut_requests_are_said_of_the_models_shown(
    counts: tuple[int, int], labels: list[str], expected: str, make_harness_run: MakeRun
) -> None:
    runs = [
        make_harness_run(label, {"acc": [1.0]}, num_shortened=count)
        for label, count in zip(("BF16", "FP8"), counts, strict=True)
    ]
    (rows,) = make_task_rows(compare_tasks(runs, "BF16"), labels, "BF16")
    assert rows.about == f"1 items, 0-shot, version 1.0{expected}"


def test_large_numbers_lose_decimals(make_harness_run: MakeRun) -> None:
    known = {"ppl": "perplexity"}
    runs = [
        make_harness_run("BF16", {"ppl": [-8.0, -8.0]}, aggregations=known),
        make_harness_run("FP8", {"ppl": [-9.0, -9.0]}, aggregations=known),
    ]
    (rows,) = make_task_rows(compare_tasks(runs, "BF16"), ["FP8"], "BF16")
    assert rows.rows[1] == ("- minus BF16", ("+5,122.1 [+5,122.1, +5,122.1]",))


def test_metric_of_a_reading_is_named_with_it(make_harness_run: MakeRun) -> None:
    (task,) = compare_tasks([make_harness_run("BF16", {"acc": [1.0]})], "BF16")
    assert name_metric(replace(task.metrics[0], filter="strict")) == "acc (strict)"
