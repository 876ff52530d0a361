"""Runs of the lm-evaluation-harness, made by hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nvvl.reports.harness_run import (
    HarnessRun,
    HarnessSettings,
    ItemScores,
    Metric,
    Score,
    TaskResult,
)

MakeHarnessRun = Callable[..., HarnessRun]


def make_result(
    task: str, aggregations: Mapping[str, str | None], num_items: int, **changes: Any
) -> TaskResult:
    values: dict[str, Any] = {
        "num_items": num_items,
        "num_fewshot": 0,
        "version": "1.0",
        "num_shortened": 0,
    }
    return TaskResult(
        task=task,
        metrics=tuple(
            Metric(
                name=name,
                filter="none",
                value=0.5,
                stderr=0.125,
                higher_is_better=True,
                aggregation=aggregation,
            )
            for name, aggregation in aggregations.items()
        ),
        **values | changes,
    )


@pytest.fixture
def make_harness_run() -> MakeHarnessRun:
    """Make a run of one task from the scores of its items, by metric."""

    def make(
        label: str,
        scores: Mapping[str, Sequence[Score]],
        *,
        task: str = "arc",
        aggregations: Mapping[str, str | None] | None = None,
        out: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> HarnessRun:
        rows = list(zip(*scores.values(), strict=True))
        known = {name: "mean" for name in scores} if aggregations is None else aggregations
        common: dict[str, Any] = {
            "model_sha256": label * 8,
            "limit": None,
            "num_fewshot": None,
            "chat": False,
            "batch_size": 32,
            "max_length": 4096,
            "device": "cpu",
            "dtype": "bfloat16",
            "tasks_folder": None,
            "tasks_sha256": None,
            "lm_eval_version": "0.4.13",
            "nvvl_version": "0.1.0",
        }
        return HarnessRun(
            out=out or Path("lm") / label,
            label=label,
            model=Path("models") / label,
            format=label,
            weights_bytes=1_000_000,
            folder_bytes=1_200_000,
            settings=HarnessSettings(**common | dict(settings or {})),
            tasks={task: (make_result(task, known, len(rows), **changes),)},
            unfinished=(),
            items={
                task: tuple(
                    ItemScores(
                        task=task,
                        index=index,
                        sha256=f"{task}-{index}",
                        scores={f"{name},none": s for name, s in zip(scores, row, strict=True)},
                    )
                    for index, row in enumerate(rows)
                )
            },
        )

    return make
