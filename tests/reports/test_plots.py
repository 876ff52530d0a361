import re
from dataclasses import replace

import pytest

from nvvl.reports.collect import Difference, Report, RunScore, SuiteScore
from nvvl.reports.compare import Interval
from nvvl.reports.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    kind_of,
    nice_ticks,
    plot_forest,
    plot_noise,
    plot_sizes,
)


def make_run(label: str, num_bytes: int, score: Interval, points: Interval | None) -> RunScore:
    difference = None
    if points is not None:
        difference = Difference(
            score=points, num_gained=1, num_lost=4, p_value=0.375, recovery_percent=99.0
        )
    suite = SuiteScore(
        metric="exact_match",
        score=score,
        exact_match=score,
        cer=score,
        anls=score,
        perplexity=score,
        visual_tokens=64.0,
        kl=None,
        top1=None,
        difference=difference,
    )
    return RunScore(
        label=label,
        format=label,
        model=label,
        out=label,
        model_sha256="0" * 64,
        dtype="bfloat16",
        weights_bytes=num_bytes,
        folder_bytes=num_bytes,
        verified=None,
        suites={"key_value": suite},
        kl=None,
        top1=None,
        gate=None,
    )


def make_report(*runs: RunScore) -> Report:
    return Report(nvvl_version="0", baseline=runs[0].label, seed=0, num_items=100, runs=runs)


BF16 = make_run("BF16", 24_000_000, Interval(0.9, 0.85, 0.95, 100), None)
FP8 = make_run("FP8", 18_000_000, Interval(0.9, 0.85, 0.95, 100), Interval(0.0, -0.01, 0.012, 100))
NVFP4 = make_run(
    "NVFP4", 16_000_000, Interval(0.87, 0.8, 0.92, 100), Interval(-0.03, -0.05, -0.01, 100)
)


@pytest.mark.parametrize(
    ("low", "high", "num", "ticks"),
    [
        (0.0, 23.5, 5, [0, 5, 10, 15, 20, 25]),
        (-3.1, 0.4, 6, [-4, -3, -2, -1, 0, 1]),
        (20.4, 31.5, 6, [20, 22, 24, 26, 28, 30, 32]),
        (0.93, 0.97, 4, [0.93, 0.94, 0.95, 0.96, 0.97]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(
    low: float, high: float, num: int, ticks: list[float]
) -> None:
    assert nice_ticks(low, high, num) == pytest.approx(ticks)


def test_ticks_of_one_value_still_span_a_scale() -> None:
    first, *_, last = nice_ticks(100.0, 100.0, 5)
    assert first <= 100.0 <= last
    assert first < last


def test_a_run_alone_has_no_forest() -> None:
    assert plot_forest(make_report(BF16)) is None


def test_forest_puts_every_difference_on_one_scale() -> None:
    forest = plot_forest(make_report(BF16, FP8, NVFP4))
    assert forest is not None
    ((suite, (fp8, nvfp4)),) = forest.suites
    assert suite == "key_value"
    assert [(row.label, row.series, row.differs) for row in (fp8, nvfp4)] == [
        ("FP8", 1, False),
        ("NVFP4", 2, True),
    ]
    assert fp8.middle == pytest.approx(forest.zero)
    assert 0 <= nvfp4.low < nvfp4.middle < nvfp4.high < forest.zero < fp8.high <= 100
    ticks = {tick.text.replace("\N{MINUS SIGN}", "-"): tick.at for tick in forest.ticks}
    assert list(ticks) == ["-6", "-4", "-2", "0", "+2"]
    assert nvfp4.middle == pytest.approx((ticks["-4"] + ticks["-2"]) / 2)


def test_sizes_keep_marks_and_intervals_inside_the_frame() -> None:
    (plot,) = plot_sizes(make_report(BF16, FP8, NVFP4))
    assert [mark.series for mark in plot.marks] == [2, 1, 0]
    for mark in plot.marks:
        assert LEFT <= mark.x <= WIDTH - RIGHT
        assert TOP <= mark.high <= mark.y <= mark.low <= HEIGHT - BOTTOM
    assert plot.x_label == "weights on disk, MB"
    assert "NVFP4: 16.00 MB, 87.0 % [80.0, 92.0]" in plot.summary


def test_formats_of_one_size_do_not_cover_each_other() -> None:
    again = replace(NVFP4, label="QAD")
    (plot,) = plot_sizes(make_report(BF16, NVFP4, again))
    nvfp4, qad, _ = plot.marks
    assert qad.x - nvfp4.x == 10
    assert nvfp4.shape != qad.shape
    assert [mark.hint.split(":")[0] for mark in plot.marks] == ["NVFP4", "QAD", "BF16"]


def test_equal_scores_get_a_readable_scale() -> None:
    perfect = Interval(1.0, 1.0, 1.0, 100)
    (plot,) = plot_sizes(make_report(make_run("BF16", 24_000_000, perfect, None)))
    assert [tick.text for tick in plot.y_ticks] == ["90", "92", "94", "96", "98", "100"]


def test_noise_is_drawn_along_depth_for_each_stack() -> None:
    weights = {
        "language_model.backbone.layers.0.mixer.in_proj": 20.0,
        "language_model.backbone.layers.10.mixer.q_proj": 21.0,
        "language_model.backbone.layers.2.mixer.up_proj": 22.0,
        "vision_model.radio_model.model.blocks.1.mlp.fc1": 30.0,
        "lm_head": 25.0,
    }
    plots = {plot.title: plot for plot in plot_noise({"NVFP4": weights}, ["BF16", "NVFP4"])}
    assert list(plots) == [
        "NVFP4, language_model.backbone.layers",
        "NVFP4, vision_model.radio_model.model.blocks",
        "NVFP4, lm_head",
    ]
    marks = plots["NVFP4, language_model.backbone.layers"].marks
    layers = [int(match[1]) for m in marks if (match := re.search(r"layers\.(\d+)", m.hint))]
    assert layers == [0, 2, 10], "by depth, not by name"
    assert [mark.x for mark in marks] == sorted(mark.x for mark in marks)
    assert [mark.shape for mark in marks] == ["circle", "triangle", "square"]
    assert marks[0].y > marks[2].y > marks[1].y, "more dB is higher"
    assert {mark.series for mark in marks} == {1}


def test_nothing_measured_draws_nothing() -> None:
    assert plot_noise({"BF16": {}}, ["BF16"]) == []


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("a.layers.0.mixer.out_proj", "Mamba"),
        ("a.layers.0.mixer.k_proj", "attention"),
        ("a.layers.0.mixer.down_proj", "MLP"),
        ("lm_head", "other"),
    ],
)
def test_kind_follows_from_the_name(module: str, kind: str) -> None:
    assert kind_of(module) == kind


def test_a_number_of_a_layer_that_is_no_such_number_is_part_of_a_name() -> None:
    (plot,) = plot_noise({"a": {f"layers.{'9' * 5000}.in_proj": 20.0}}, ["a"])
    assert len(plot.marks) == 1
