"""Results of the lm-evaluation-harness, compared item by item with those of one model.

Every number and standard error is the harness's own. What is added is what it has not: the paired
difference of two models on the same items, with a bootstrap over items, and McNemar's test where
each item is right or wrong (`nvvl.reports.compare`). Results of one task are comparable only if
what was asked is the same to the byte, which the hash of every item says; else they are refused.

A difference is taken of numbers that are made of their items' scores in a way that is known here
(`AGGREGATIONS`), which almost all are. F1 over all items, BLEU, and the number of a group of tasks
have none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nvvl.errors import DataError
from nvvl.reports.compare import (
    FloatArray,
    Interval,
    mcnemar_test,
    paired_difference,
    paired_ratios,
)
from nvvl.reports.harness_run import HarnessRun, ItemScores, Metric, Score, TaskResult
from nvvl.reports.json_values import LARGEST
from nvvl.reports.run import name_setting, value_in_words


def _perplexity(nats: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-nats))


def _bits(nats: FloatArray) -> FloatArray:
    return -nats / math.log(2)


# The harness's names of what makes a number of (weighted) means of scores, and how it does.
AGGREGATIONS: Mapping[str, Callable[[FloatArray], FloatArray] | None] = {
    "mean": None,
    "perplexity": _perplexity,
    "weighted_perplexity": _perplexity,
    "bits_per_byte": _bits,
}


@dataclass(frozen=True, kw_only=True)
class TaskDifference:
    """A model against the baseline, on the same items of a task.

    Attributes:
        score: difference of the metric.
        num_gained: items that only this model scores 1 on; None where scores are not 0 or 1.
        num_lost: items that only the baseline scores 1 on; None as above.
        p_value: McNemar's exact test on these two counts; None as above.
    """

    score: Interval
    num_gained: int | None = None
    num_lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One number of one model.

    Attributes:
        value: as the harness gives it; None where it is not finite.
        stderr: its standard error; None where the harness has none, and as above.
        difference: None for the baseline itself, and where none can be taken.
    """

    value: float | None
    stderr: float | None
    difference: TaskDifference | None


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One metric of a task, of every model that has it.

    Attributes:
        filter: which reading of the answers it is of; ``none`` for the answers as they are.
        higher_is_better: None if the harness does not say.
        scores: by label.
    """

    name: str
    filter: str
    higher_is_better: bool | None
    scores: Mapping[str, TaskScore]


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task, asked of some models alike.

    Attributes:
        num_items: None for a group of tasks.
        num_fewshot: examples before each question.
        limit: first items that were asked; None for all.
        chat: whether prompts were put into the model's chat template.
        max_length: most tokens of a request.
        num_shortened: requests that were longer and lost their beginning, by label.
        dtype: of the computation.
        outs: folder of the results, by label.
    """

    task: str
    version: str | None
    num_items: int | None
    num_fewshot: int | None
    limit: int | None
    chat: bool
    max_length: int
    num_shortened: Mapping[str, int]
    dtype: str
    lm_eval_version: str
    outs: Mapping[str, str]
    metrics: tuple[TaskMetric, ...]


class _Entry(NamedTuple):
    """The results of one model of one task."""

    run: HarnessRun
    result: TaskResult

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for a comparison, as `TaskComparison` names it."""
        settings = self.run.settings
        return {
            "version": self.result.version,
            "num_fewshot": self.result.num_fewshot,
            "limit": settings.limit,
            "chat": settings.chat,
            "max_length": settings.max_length,
            "dtype": settings.dtype,
            "lm_eval_version": settings.lm_eval_version,
        }

    @property
    def items(self) -> tuple[ItemScores, ...]:
        """The items of the task; none of a group."""
        return self.run.items.get(self.result.task, ())

    @property
    def metrics(self) -> dict[str, Metric]:
        """The numbers by their keys."""
        return {metric.key: metric for metric in self.result.metrics}


def compare_tasks(runs: Sequence[HarnessRun], baseline: str) -> tuple[TaskComparison, ...]:
    """Compare the results of some runs, task by task in the order they come in.

    Args:
        runs: finished runs; those of one label have different tasks.
        baseline: label of the model that the others are compared with, where it has the task.

    Raises:
        DataError: if a label has a task twice, or a task was not asked alike.
    """
    found: dict[str, dict[str, _Entry]] = {}
    for run in runs:
        for task, result in {result.task: result for result in run.results}.items():
            entries = found.setdefault(task, {})
            if run.label in entries:
                raise DataError(
                    f"{run.out}: {task} of {run.label} is in {entries[run.label].run.out} too; "
                    "give one of them, or run one with another --label"
                )
            entries[run.label] = _Entry(run, result)
    for first, *others in (list(entries.values()) for entries in found.values()):
        for other in others:
            _require_alike(first, other)
    return tuple(_compare_task(entries, baseline) for entries in found.values())


def _require_alike(first: _Entry, other: _Entry) -> None:
    task, place, there = other.result.task, other.run.out, first.run.out
    wanted, asked = first.settings, other.settings
    differing = [name for name in wanted if asked[name] != wanted[name]]
    if differing:
        which = ", ".join(
            f"{name_setting(name)} {value_in_words(asked[name])} "
            f"(there {value_in_words(wanted[name])})"
            for name in differing
        )
        raise DataError(
            f"{place}: {task} was not run as in {there}: {which}; run both with the same settings"
        )
    hashes, others = ({item.index: item.sha256 for item in e.items} for e in (first, other))
    changed = sorted(i for i in hashes.keys() | others.keys() if hashes.get(i) != others.get(i))
    if changed:
        raise DataError(
            f"{place}: {len(changed)} items of {task} differ from those in {there}, first "
            f"{changed[0]}; run both with the same task files and data"
        )


def _compare_task(entries: Mapping[str, _Entry], baseline: str) -> TaskComparison:
    first = next(iter(entries.values()))
    metrics = {key: metric for entry in entries.values() for key, metric in entry.metrics.items()}
    return TaskComparison(
        task=first.result.task,
        num_items=first.result.num_items,
        num_shortened={label: entry.result.num_shortened for label, entry in entries.items()},
        outs={label: str(entry.run.out) for label, entry in entries.items()},
        metrics=tuple(
            TaskMetric(
                name=metric.name,
                filter=metric.filter,
                higher_is_better=metric.higher_is_better,
                scores={
                    label: _score(entry, key, None if label == baseline else entries.get(baseline))
                    for label, entry in entries.items()
                    if key in entry.metrics
                },
            )
            for key, metric in metrics.items()
        ),
        **first.settings,
    )


def _score(entry: _Entry, key: str, baseline: _Entry | None) -> TaskScore:
    metric = entry.metrics[key]
    difference = None
    aggregation = metric.aggregation
    if baseline is not None and aggregation is not None and aggregation in AGGREGATIONS:
        difference = _compare_items(
            aggregation,
            [item.scores.get(key) for item in baseline.items],
            [item.scores.get(key) for item in entry.items],
        )
    return TaskScore(
        value=_finite(metric.value),
        stderr=_finite(metric.stderr),
        difference=difference,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _compare_items(
    aggregation: str, before: Sequence[Score | None], after: Sequence[Score | None]
) -> TaskDifference | None:
    """Compare scores item by item; None where an item has none, no weight, or one beyond bounds."""
    if not before:
        return None
    baseline, values = _as_columns(before), _as_columns(after)
    is_small = np.abs([baseline, values]) <= LARGEST  # NaN is not
    if not is_small.all() or (baseline[:, 1] <= 0).any():
        return None
    aggregate = AGGREGATIONS[aggregation]
    if aggregate is None:
        score = paired_difference(baseline[:, 0], values[:, 0])
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # a perplexity of a broken model
            score = paired_ratios(baseline[:, 0], values[:, 0], baseline[:, 1], aggregate)
        if not np.isfinite([score.estimate, score.low, score.high]).all():
            return None
    difference = TaskDifference(score=score)
    if aggregate is not None or not {*before, *after} <= {0.0, 1.0}:
        return difference
    pairs = list(zip(before, after, strict=True))
    num_gained, num_lost = pairs.count((0.0, 1.0)), pairs.count((1.0, 0.0))
    p_value = mcnemar_test(num_gained, num_lost)
    return replace(difference, num_gained=num_gained, num_lost=num_lost, p_value=p_value)


def _as_columns(scores: Sequence[Score | None]) -> FloatArray:
    """Return values and weights (n, 2); a score that is missing is not a number."""
    rows = [s if isinstance(s, tuple) else (math.nan if s is None else s, 1.0) for s in scores]
    return np.array(rows, dtype=np.float64)
