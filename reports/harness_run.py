"""One run of the lm-evaluation-harness on disk: settings, results, and the scores of every item.

A run is three files in the folder of a model, beside what ``nvvl evaluate`` keeps there.
``lm-eval.json`` holds settings and the results of each task, as the harness computed them, and
names the tasks that were begun and have none. ``lm-eval-items.jsonl`` holds the scores of one item
a line, with the hash of what was asked, so that two models can be compared item by item.
``lm-eval.jsonl`` holds the responses (`nvvl.reports.harness_journal`).

No torch and no lm-eval here: reports are made from these files alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nvvl.errors import DataError, reading
from nvvl.reports.json_values import read_object
from nvvl.reports.run import ModelRun

RESULTS_NAME = "lm-eval.json"
ITEMS_NAME = "lm-eval-items.jsonl"
RESPONSES_NAME = "lm-eval.jsonl"

# A number, or a sum and the weight it is divided by: log-likelihood and words, for a perplexity.
Score = float | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """What determines the results of a run.

    Attributes:
        model_sha256: `nvvl.reports.run.fingerprint` of the model's folder.
        limit: first items of each task; None for all.
        num_fewshot: as asked for; None for what each task says.
        chat: whether prompts were put into the model's chat template.
        max_length: most tokens of a request.
        arithmetic: as in `nvvl.reports.run.Settings`.
        tasks_folder: with task files of the user's own.
        tasks_sha256: of these files.
    """

    model_sha256: str
    limit: int | None
    num_fewshot: int | None
    chat: bool
    batch_size: int
    max_length: int
    device: str
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    dtype: str
    tasks_folder: str | None
    tasks_sha256: str | None
    lm_eval_version: str
    nvvl_version: str


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a task.

    Attributes:
        name: such as ``acc``.
        filter: which reading of the answers it is of; ``none`` for the answers as they are.
        value: as the harness gives it.
        stderr: its standard error, if the harness has one.
        higher_is_better: None if the harness does not say.
        aggregation: how the harness makes it of the items' scores, where that is one of
            `nvvl.reports.tasks.AGGREGATIONS`; None for any other way.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    aggregation: str | None

    @property
    def key(self) -> str:
        """What tells the numbers of a task apart, and names them in `ItemScores`."""
        return f"{self.name},{self.filter}"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task, or a group of tasks, came to.

    Attributes:
        num_items: items asked; None for a group.
        num_fewshot: examples before each question; None for a group of tasks that differ in it.
        version: of the task.
        num_shortened: requests that lost their beginning, as they were longer than
            ``max_length``.
    """

    task: str
    num_items: int | None
    num_fewshot: int | None
    version: str | None
    num_shortened: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True)
class ItemScores:
    """One item of a task, as one model did on it.

    Attributes:
        index: number of the item in its task.
        sha256: hash of every request made of it, and of what was right.
        scores: by `Metric.key`, those that have an `aggregation`.
    """

    task: str
    index: int
    sha256: str
    scores: Mapping[str, Score]


@dataclass(frozen=True, kw_only=True)
class HarnessRun(ModelRun):
    """What one model came to.

    Attributes:
        tasks: results by the name that was asked for, which may be that of a group.
        unfinished: names that were asked for and have no results.
        items: by task, in the order of their numbers.
    """

    settings: HarnessSettings
    tasks: Mapping[str, tuple[TaskResult, ...]]
    unfinished: tuple[str, ...]
    items: Mapping[str, tuple[ItemScores, ...]]

    @property
    def results(self) -> tuple[TaskResult, ...]:
        """The results of all tasks."""
        return tuple(result for results in self.tasks.values() for result in results)

    def select(self, tasks: Sequence[str]) -> "HarnessRun":
        """Return the run with some of its tasks alone, named as they were asked for."""
        return replace(self, tasks={task: self.tasks[task] for task in tasks})

    def lacks_items(self, task: str) -> bool:
        """Tell whether scores of items are missing of a task that was asked for."""
        return any(
            len(self.items.get(result.task, ())) < (result.num_items or 0)
            for result in self.tasks[task]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``lm-eval.json`` holds: all but the items, and the folder it is in."""
        values = asdict(replace(self, items={})) | {"model": str(self.model)}
        return {key: value for key, value in values.items() if key not in ("out", "items")}


def load_harness_run(out: Path) -> HarnessRun:
    """Read the folder of a finished run.

    Raises:
        DataError: if it is no such folder, does not parse, or lacks results or items.
    """
    run = read_harness_run(out)
    missing = [*run.unfinished, *(task for task in run.tasks if run.lacks_items(task))]
    if missing:
        raise DataError(
            f"{out}: the run is not finished, results of all items are missing of "
            f"{', '.join(missing)}; run nvvl lm-eval with the same settings and it goes on"
        )
    return run


def read_harness_run(out: Path) -> HarnessRun:
    """Read a run, finished or not.

    Raises:
        DataError: if a file is missing, does not parse, or has what no run has.
    """
    path = out / RESULTS_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise _no_results(path, error) from None
    items = _read_items(out / ITEMS_NAME)
    try:
        # numbers of the harness may be infinite; those are not compared
        return read_object(HarnessRun, json.loads(text), "run", finite=False, out=out, items=items)
    except (ValueError, RecursionError, DataError) as error:
        raise _no_results(path, error) from None


def _no_results(path: Path, reason: Exception) -> DataError:
    return DataError(f"{path}: not results of nvvl lm-eval ({reason}); choose another folder")


def _read_items(path: Path) -> dict[str, tuple[ItemScores, ...]]:
    """Read the items of complete lines, by task; of an item that comes twice, the last."""
    found: dict[str, dict[int, ItemScores]] = {}
    if not path.is_file():
        return {}
    with reading(path):
        *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            item = read_object(ItemScores, json.loads(line), "item", finite=False)
        except (ValueError, RecursionError, DataError) as error:
            raise DataError(
                f"{path}: line {number} is not scores of an item ({error}); remove the file and "
                "run again"
            ) from None
        found.setdefault(item.task, {})[item.index] = item
    return {task: tuple(item for _, item in sorted(items.items())) for task, items in found.items()}
