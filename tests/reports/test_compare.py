from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from nvvl.reports.compare import (
    Interval,
    bootstrap_intervals,
    bootstrap_ratio,
    mcnemar_test,
    paired_difference,
    paired_ratios,
    recovery_percent,
    wilson_interval,
)


def mean_interval(values: npt.ArrayLike, **options: Any) -> Interval:
    (interval,) = bootstrap_intervals(np.asarray(values)[:, None], **options)
    return interval


@pytest.mark.parametrize(
    ("num_successes", "num_trials"), [(0, 10), (10, 10), (1, 1), (3, 7), (940, 1000), (999, 1000)]
)
def test_wilson_interval_agrees_with_scipy(num_successes: int, num_trials: int) -> None:
    interval = wilson_interval(num_successes, num_trials)
    expected = stats.binomtest(num_successes, num_trials).proportion_ci(0.95, method="wilson")
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert interval.estimate == num_successes / num_trials
    assert interval.n == num_trials


@pytest.mark.parametrize(("num_successes", "num_trials"), [(0, 0), (2, 1), (-1, 5)])
def test_wilson_interval_needs_a_proportion(num_successes: int, num_trials: int) -> None:
    with pytest.raises(ValueError, match="required 0 <= successes <= trials"):
        wilson_interval(num_successes, num_trials)


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=400)
    interval = mean_interval(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    # Two sets of 10,000 draws: an end wanders by about 2 % of the standard error of 0.05.
    assert interval.low == pytest.approx(expected.low, abs=0.005)
    assert interval.high == pytest.approx(expected.high, abs=0.005)
    assert interval.estimate == pytest.approx(values.mean())


def test_bootstrap_interval_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(values)
    monkeypatch.setattr("nvvl.reports.compare._CHUNK_DRAWS", 120)
    chunked = mean_interval(values)
    assert chunked.low == pytest.approx(whole.low, rel=1e-12)
    assert chunked.high == pytest.approx(whole.high, rel=1e-12)


def test_wider_confidence_gives_a_wider_interval() -> None:
    values = np.random.default_rng(0).normal(size=100)
    narrow, wide = mean_interval(values, confidence=0.8), mean_interval(values)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values", [[], [0.0, float("nan")]])
def test_bootstrap_interval_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="required finite values of at least one item"):
        mean_interval(values)


def test_columns_have_the_intervals_they_have_alone() -> None:
    columns = np.random.default_rng(0).normal(size=(50, 3))
    together = bootstrap_intervals(columns)
    for index, interval in enumerate(together):
        alone = mean_interval(columns[:, index])
        # The order of summation in a matrix product depends on its shape.
        assert interval.low == pytest.approx(alone.low, rel=1e-12)
        assert interval.high == pytest.approx(alone.high, rel=1e-12)
        assert interval.estimate == pytest.approx(alone.estimate, rel=1e-12)


def test_a_run_does_not_differ_from_itself() -> None:
    scores = np.random.default_rng(0).integers(0, 2, size=1000)
    difference = paired_difference(scores, scores)
    assert (difference.estimate, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_pairing_sees_a_loss_that_two_single_intervals_hide() -> None:
    generator = np.random.default_rng(0)
    before = (generator.random(1000) < 0.8).astype(float)
    after = before.copy()
    after[np.flatnonzero(before)[:12]] = 0.0
    difference = paired_difference(before, after)
    assert difference.estimate == pytest.approx(-0.012)
    assert difference.high < 0
    single_before = wilson_interval(int(before.sum()), 1000)
    single_after = wilson_interval(int(after.sum()), 1000)
    assert single_after.high > single_before.low


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = mean_interval(generator.normal(1.0, 2.0, size=200), num_resamples=500, seed=seed)
        hits += interval.low <= 1.0 <= interval.high
    # 95 % of 200 is 190 with a standard deviation of 3; four of those below.
    assert hits >= 178


def test_scores_of_different_items_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="the same items"):
        paired_difference([1.0, 0.0], [1.0])


@pytest.mark.parametrize(
    ("num_gained", "num_lost"), [(0, 0), (1, 0), (5, 5), (2, 12), (12, 2), (30, 51), (700, 800)]
)
def test_mcnemar_agrees_with_the_binomial_test(num_gained: int, num_lost: int) -> None:
    changed = num_gained + num_lost
    expected = stats.binomtest(num_gained, changed).pvalue if changed else 1.0
    assert mcnemar_test(num_gained, num_lost) == pytest.approx(expected, rel=1e-9)


def test_recovery_of_nothing_is_undefined() -> None:
    assert recovery_percent(0.9, 0.9) == pytest.approx(100)
    assert recovery_percent(0.45, 0.9) == pytest.approx(50)
    assert recovery_percent(0.1, 0.0) is None
    assert recovery_percent(1.0, 1e-308) is None, "infinite, which JSON has not"


def test_ratio_of_sums_weighs_items_by_their_tokens() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(2, 30, size=400).astype(float)
    nlls = tokens * generator.gamma(2.0, 0.5, size=400)
    ratio = bootstrap_ratio(nlls, tokens)
    assert ratio.estimate == pytest.approx(nlls.sum() / tokens.sum())
    # the delta method: residuals of the ratio over the mean count
    residuals = nlls - ratio.estimate * tokens
    error = residuals.std(ddof=1) / np.sqrt(400) / tokens.mean()
    # 10,000 resamples give each end to about 2 % of the width
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert ratio.low < ratio.estimate < ratio.high


@pytest.mark.parametrize(
    ("numerators", "denominators"), [([], []), ([1.0], [0.0]), ([np.nan], [1.0])]
)
def test_ratio_needs_items_with_tokens(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="required"):
        bootstrap_ratio(numerators, denominators)


def test_paired_ratios_of_equal_weights_are_a_paired_difference() -> None:
    generator = np.random.default_rng(2)
    before, after = generator.normal(size=(2, 60))
    found = paired_ratios(before, after, np.full(60, 3.0), lambda ratios: 3 * ratios)
    expected = paired_difference(before, after)  # the same draws
    assert found.estimate == pytest.approx(expected.estimate)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 60


@pytest.mark.parametrize(
    ("baseline", "values", "weights"),
    [
        ([], [], []),
        ([1.0], [1.0, 2.0], [1.0]),
        ([1.0], [float("nan")], [1.0]),
        ([1.0], [1.0], [0.0]),
    ],
)
def test_paired_ratios_need_the_same_items_with_weights(
    baseline: list[float], values: list[float], weights: list[float]
) -> None:
    with pytest.raises(ValueError, match="paired_ratios: required"):
        paired_ratios(baseline, values, weights, np.exp)
