"""Statistics that say whether a difference between two runs is real.

Quantization costs tenths of a point, and a thousand answers have a standard error of about one.
The same items are therefore asked of every run and the *differences of items* are resampled: an
item that both runs get right, or both get wrong, adds no noise.

`wilson_interval`       one proportion (Wilson, JASA 22, 1927); keeps inside 0..1 near the ends.
`bootstrap_intervals`   percentile bootstrap of means (Efron and Tibshirani, 1993, chapter 13).
`bootstrap_ratio`       the same, of a ratio of sums, such as a mean over tokens.
`paired_difference`     the same, of per-item differences.
`paired_ratios`         the same, of two ratios of sums or of what is made of them, as perplexities.
`mcnemar_test`          exact two-sided test on the items that changed sides (McNemar 1947).

Everything is deterministic: resampling has a fixed seed. Nothing here corrects for looking at many
comparisons at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95

# Drawn item indices held at a time: 2 M x 8 bytes = 16 MB.
_CHUNK_DRAWS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate from ``n`` items, and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float
    n: int


def wilson_interval(
    num_successes: int, num_trials: int, *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the proportion of successes and Wilson's score interval.

    Raises:
        ValueError: if there is no trial, or the successes are not within 0..num_trials.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(
            f"wilson_interval: required 0 <= successes <= trials and a trial, got "
            f"{num_successes} of {num_trials}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = num_successes / num_trials
    shrink = 1 + z * z / num_trials
    centre = (rate + z * z / (2 * num_trials)) / shrink
    spread = rate * (1 - rate) / num_trials + z * z / (4 * num_trials * num_trials)
    half = z * math.sqrt(spread) / shrink
    # Rounding would otherwise leave ends such as -1e-17 and 1 - 1e-16 at 0 and n successes.
    low = 0.0 if num_successes == 0 else centre - half
    high = 1.0 if num_successes == num_trials else centre + half
    return Interval(rate, low, high, num_trials)


def bootstrap_intervals(
    columns: npt.ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Return the mean of each column and its percentile bootstrap interval.

    Columns measured on the same items share their draws, which are most of the work.

    Args:
        columns: (n, k), one row an item and one column a measurement.
        confidence: probability mass of each interval.
        num_resamples: how many sets of n items are drawn with replacement.
        seed: seed of the draws.

    Raises:
        ValueError: if there is no item, or a value is not finite.
    """
    samples = np.asarray(columns, dtype=np.float64)
    if samples.ndim != 2 or not samples.size or not np.isfinite(samples).all():
        raise ValueError(
            f"bootstrap_intervals: required finite values of at least one item, got shape "
            f"{samples.shape} with {int((~np.isfinite(samples)).sum())} not finite"
        )
    means = _resample_means(samples, num_resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    lows, highs = np.quantile(means, [tail, 1 - tail], axis=0)
    return [
        Interval(float(mean), float(low), float(high), len(samples))
        for mean, low, high in zip(samples.mean(axis=0), lows, highs, strict=True)
    ]


def bootstrap_ratio(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return sum(numerators) / sum(denominators) and its percentile bootstrap interval.

    Both sides of an item are drawn together, as for a mean over tokens when items are sampled.

    Args:
        numerators: (n,) finite.
        denominators: (n,) positive.
        confidence: probability mass of the interval.
        num_resamples: how many sets of n items are drawn with replacement.
        seed: seed of the draws.

    Raises:
        ValueError: if there is no item, or a value is out of range.
    """
    samples = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=-1)
    if samples.ndim != 2 or not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"bootstrap_ratio: required finite values, got shape {samples.shape}")
    if (samples[:, 1] <= 0).any():
        raise ValueError("bootstrap_ratio: required positive denominators")
    means = _resample_means(samples, num_resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means[:, 0] / means[:, 1], [tail, 1 - tail])
    estimate = samples[:, 0].sum() / samples[:, 1].sum()
    return Interval(float(estimate), float(low), float(high), len(samples))


def paired_difference(
    baseline: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return mean(values - baseline) over the same items and its bootstrap interval.

    Args:
        baseline: (n,) score of each item in the run compared with.
        values: (n,) score of each item in the run under test, in the same order.
        confidence: probability mass of the interval.
        num_resamples: how many sets of n items are drawn with replacement.
        seed: seed of the draws.

    Raises:
        ValueError: if the lengths differ, and as `bootstrap_intervals`.
    """
    before = np.asarray(baseline, dtype=np.float64)
    after = np.asarray(values, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"paired_difference: required scores of the same items, got {before.shape} and "
            f"{after.shape}"
        )
    (interval,) = bootstrap_intervals(
        (after - before)[:, None], confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return interval


def paired_ratios(
    baseline: npt.ArrayLike,
    values: npt.ArrayLike,
    weights: npt.ArrayLike,
    aggregate: Callable[[FloatArray], FloatArray],
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return how two numbers differ that are each made of sum(values) / sum(weights).

    Args:
        baseline: (n,) of each item in the run compared with.
        values: (n,) of each item in the run under test, in the same order.
        weights: (n,) positive, of both.
        aggregate: from ratios (k,) to the numbers (k,) that are compared.
        confidence: probability mass of the interval.
        num_resamples: how many sets of n items are drawn with replacement.
        seed: seed of the draws.

    Raises:
        ValueError: if the lengths differ, there is no item, or a value is out of range.
    """
    columns = [np.asarray(column, float) for column in (baseline, values, weights)]
    if len({column.shape for column in columns}) > 1 or not columns[0].size:
        raise ValueError(
            f"paired_ratios: required values of the same items, got {columns[0].shape}, "
            f"{columns[1].shape} and {columns[2].shape}"
        )
    samples = np.stack(columns, axis=-1)
    if not np.isfinite(samples).all() or (samples[:, 2] <= 0).any():
        raise ValueError("paired_ratios: required finite values and positive weights")
    means = _resample_means(samples, num_resamples, np.random.default_rng(seed))
    means = np.vstack([samples.mean(axis=0), means])  # the items themselves come first
    before, after = (aggregate(means[:, column] / means[:, 2]) for column in (0, 1))
    differences = after - before
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences[1:], [tail, 1 - tail])
    return Interval(float(differences[0]), float(low), float(high), len(samples))


def mcnemar_test(num_gained: int, num_lost: int) -> float:
    """Return the exact two-sided p-value that gains and losses are equally likely.

    Args:
        num_gained: items wrong in the baseline and right in the run.
        num_lost: items right in the baseline and wrong in the run.
    """
    num_changed = num_gained + num_lost
    fewer = min(num_gained, num_lost)
    # Integers of any size: no rounding before the last division.
    tail = sum(math.comb(num_changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_changed)


def recovery_percent(value: float, baseline: float) -> float | None:
    """Return ``value`` as a percentage of ``baseline``; None if that is 0, or as good as 0."""
    percent = 100 * value / baseline if baseline else math.inf
    return percent if math.isfinite(percent) else None


def _resample_means(
    samples: FloatArray, num_resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Draw ``num_resamples`` sets of n rows with replacement; return their means (.., k)."""
    num_rows = len(samples)
    sets_at_once = max(1, _CHUNK_DRAWS // num_rows)
    means = np.empty((num_resamples, samples.shape[1]))
    for start in range(0, num_resamples, sets_at_once):
        stop = min(start + sets_at_once, num_resamples)
        draws = generator.integers(num_rows, size=(stop - start, num_rows))
        # How often each row is in each set: then all columns are one matrix product.
        draws += np.arange(stop - start)[:, None] * num_rows
        counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
        means[start:stop] = counts.astype(np.float64) @ samples / num_rows
    return means
