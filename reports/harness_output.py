"""What the lm-evaluation-harness returns of a task, as `nvvl.reports.harness_run` keeps it.

The harness gives a number of each metric and, of each item, what was asked, what was right and its
scores. An item is known by the hash of all that, so that two models are compared on what both were
asked. Its scores are kept of metrics whose number is made of them in a way that is known here;
others (F1 over all items, BLEU) have their number and standard error alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nvvl.reports.harness_run import ItemScores, Metric, Score, TaskResult
from nvvl.reports.tasks import AGGREGATIONS


def read_output(
    found: Mapping[str, Any], tasks: Mapping[str, Any], *, num_shortened: Mapping[str | None, int]
) -> tuple[list[TaskResult], dict[str, tuple[ItemScores, ...]]]:
    """Return results, and scores of items by task.

    Args:
        found: what ``lm_eval.evaluator.evaluate`` returned, with its samples.
        tasks: the harness's tasks that were run, by name, without their groups.
        num_shortened: requests that were too long, by task.
    """
    results, items = [], {}
    for name, values in found["results"].items():
        task = tasks.get(name)  # None for a group
        counts = found["n-samples"].get(name)
        label = found["versions"].get(name)
        directions = found["higher_is_better"].get(name, {})
        result = TaskResult(
            task=name,
            num_items=None if counts is None else counts["effective"],
            num_fewshot=found["n-shot"].get(name),
            version=None if label is None else str(label),
            num_shortened=_count_shortened(name, num_shortened, found["group_subtasks"]),
            metrics=tuple(_read_metrics(values, directions, _name_aggregations(task))),
        )
        results.append(result)
        if task is not None:
            items[name] = _read_items(result, found["samples"][name])
    return results, items


def _count_shortened(
    name: str, counts: Mapping[str | None, int], members: Mapping[str, Sequence[str]]
) -> int:
    """Return the count of a task, or the sum of a group."""
    return counts.get(name, 0) + sum(
        _count_shortened(member, counts, members) for member in members.get(name, ())
    )


def _name_aggregations(task: Any) -> Mapping[str, str | None]:
    """Return how a task makes its numbers of its items' scores, by metric; nothing of a group."""
    from lm_eval.api import metrics

    known = {getattr(metrics, name): name for name in AGGREGATIONS}
    found = {} if task is None else task.aggregation()
    return {metric: known.get(aggregate) for metric, aggregate in found.items()}


def _read_metrics(
    values: Mapping[str, Any],
    directions: Mapping[str, bool | None],
    aggregations: Mapping[str, str | None],
) -> Iterator[Metric]:
    for key, value in values.items():
        name, separator, reading = key.partition(",")
        if not separator or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{reading}")
        yield Metric(
            name=name,
            filter=reading,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            higher_is_better=directions.get(name),
            aggregation=aggregations.get(name),
        )


def _read_items(result: TaskResult, samples: Sequence[Mapping[str, Any]]) -> tuple[ItemScores, ...]:
    """Join what was logged of each item, which is once for each reading of its answers."""
    hashes: dict[int, str] = {}
    scores: dict[int, dict[str, Score]] = {}
    for sample in samples:
        index = sample["doc_id"]
        hashes[index] = _hash_item(sample)
        scores.setdefault(index, {}).update(
            (metric.key, _read_score(sample[metric.name]))
            for metric in result.metrics
            if metric.aggregation is not None
            and metric.filter == sample["filter"]
            and metric.name in sample
        )
    return tuple(
        ItemScores(task=result.task, index=index, sha256=hashes[index], scores=scores[index])
        for index in sorted(hashes)
    )


def _hash_item(sample: Mapping[str, Any]) -> str:
    asked = [sample["arguments"], sample["doc_hash"], sample["target_hash"]]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_score(value: Any) -> Score:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else float(value)
