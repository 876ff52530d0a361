"""Tasks of the lm-evaluation-harness as rows and as a table for the terminal.

Models stand side by side and numbers below each other, as in `nvvl.reports.render`. Numbers are not
made percentages: they are what the harness prints, so that they can be held against others'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from nvvl.reports.tasks import TaskComparison, TaskMetric, TaskScore

TASK_NOTES = (
    "Numbers of tasks and their standard errors (±) are those of the lm-evaluation-harness; an "
    "arrow says whether more or less is better.",
    "Differences of tasks are taken over the same items, with a paired bootstrap 95 % interval, "
    "and McNemar's exact test where items score 0 or 1. Numbers that are not made of one score an "
    "item, such as that of a group of tasks, have none.",
)

_NONE = "-"
_ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The numbers of one task, formatted.

    Attributes:
        about: what was asked, in words.
        rows: name and a cell for each model.
    """

    task: str
    about: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def make_task_rows(
    tasks: Sequence[TaskComparison], labels: Sequence[str], baseline: str
) -> list[TaskRows]:
    """Return the numbers of those tasks that one of some models has.

    Args:
        tasks: of a report.
        labels: of the models, one for each cell of a row.
        baseline: label of the model that the others are compared with.
    """
    return [
        TaskRows(
            task=task.task,
            about=_describe(task, labels),
            rows=tuple(
                row for metric in task.metrics for row in _make_rows(metric, labels, baseline)
            ),
        )
        for task in tasks
        if task.outs.keys() & set(labels)
    ]


def task_table(tasks: Sequence[TaskComparison], labels: Sequence[str], baseline: str) -> Table:
    """Return the numbers of all tasks as a rich table; arguments as `make_task_rows`."""
    table = Table(
        title=describe_harness(tasks),
        caption="±: the harness's standard error; brackets: paired 95 % intervals",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", overflow="fold")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for task in make_task_rows(tasks, labels, baseline):
        table.add_section()
        table.add_row(Text.assemble((task.task, "bold"), f"\n{task.about}"))
        for name, cells in task.rows:
            table.add_row(name, *cells)
    return table


def describe_harness(tasks: Sequence[TaskComparison]) -> str:
    """Name the harness and its version, or versions."""
    versions = sorted({task.lm_eval_version for task in tasks})
    return f"lm-evaluation-harness {', '.join(versions)}"


def _describe(task: TaskComparison, labels: Sequence[str]) -> str:
    first = "" if task.limit is None else "first "
    parts = [
        "a group of tasks" if task.num_items is None else f"{first}{task.num_items:,} items",
        None if task.num_fewshot is None else f"{task.num_fewshot}-shot",
        "chat template" if task.chat else None,
        None if task.version is None else f"version {task.version}",
        _describe_cut(task, labels),
    ]
    return ", ".join(part for part in parts if part is not None)


def _describe_cut(task: TaskComparison, labels: Sequence[str]) -> str | None:
    """Say how many requests some models did not see whole; None if they saw all."""
    counts = [task.num_shortened[label] for label in labels if label in task.num_shortened]
    least, most = min(counts), max(counts)
    if not most:
        return None
    count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"{count} requests cut to --max-length {task.max_length} (raise it)"


def _make_rows(
    metric: TaskMetric, labels: Sequence[str], baseline: str
) -> list[tuple[str, tuple[str, ...]]]:
    scores = [metric.scores.get(label) for label in labels]
    differences = [None if score is None else score.difference for score in scores]
    name = name_metric(metric) + _ARROWS[metric.higher_is_better]
    rows = [(name, tuple(map(_format_value, scores)))]
    if any(differences):
        rows.append((f"- minus {baseline}", tuple(map(_format_difference, scores))))
    if any(found is not None and found.p_value is not None for found in differences):
        rows.append(("- McNemar's p", tuple(map(_format_test, scores))))
    return rows


def name_metric(metric: TaskMetric) -> str:
    """Return a metric's name, with its reading of the answers if that is not their plain text."""
    return metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"


def _format_value(score: TaskScore | None) -> str:
    if score is None or score.value is None:
        return _NONE
    stderr = "" if score.stderr is None else f" ± {_format(score.stderr)}"
    return _format(score.value) + stderr


def _format_difference(score: TaskScore | None) -> str:
    if score is None or score.difference is None:
        return _NONE
    found = score.difference.score
    return f"{_signed(found.estimate)} [{_signed(found.low)}, {_signed(found.high)}]"


def _format_test(score: TaskScore | None) -> str:
    if score is None or score.difference is None or score.difference.p_value is None:
        return _NONE
    found = score.difference
    return f"{found.p_value:.2g} ({found.num_gained} gained, {found.num_lost} lost)"


def _format(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _signed(value: float) -> str:
    """Format a difference; what rounds to 0 has no sign."""
    text = _format(value, "+")
    return text if text.strip("+-0.") else "0.0000"
