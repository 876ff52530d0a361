"""A comparison as ``report.json``, as Markdown, and as a table for the terminal.

Runs stand side by side and measurements below each other, so that any number of suites fits a
terminal of 80 columns. A number is followed by its 95 % interval in brackets. Nothing is rounded
in ``report.json``, and what is infinite is null there, for JSON has no infinity.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from nvvl.reports.collect import Report, RunScore, SuiteScore
from nvvl.reports.compare import Interval
from nvvl.reports.harness_text import TASK_NOTES, describe_harness, make_task_rows
from nvvl.reports.markdown import markdown_cell, plain_markdown
from nvvl.reports.metrics import TOKEN_PROBABILITY

_NONE = "-"


@dataclass(frozen=True)
class Row:
    """A measurement of every run, formatted."""

    name: str
    cells: tuple[str, ...]


def render_json(report: Report) -> str:
    """Return the text of ``report.json``."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"


def to_json(report: Report) -> dict[str, Any]:
    """Return what ``report.json`` holds; `nvvl.reports` has a schema of it."""
    values: dict[str, Any] = _without_infinity(asdict(report))
    return values


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(entry) for entry in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def render_markdown(report: Report) -> str:
    """Return the comparison as a Markdown page."""
    labels = [run.label for run in report.runs]
    lines = [
        f"# {plain_markdown(' / '.join(labels))}",
        "",
        f"{plain_markdown(_describe_items(report))} Brackets are 95 % intervals.",
        "",
        _markdown_line(["", *labels]),
        _markdown_line(["---", *("---:" for _ in labels)]),
        *(_markdown_line([row.name, *row.cells]) for row in make_rows(report)),
        "",
        *(_markdown_tasks(report, labels) if report.tasks else []),
        "## Runs",
        "",
    ]
    for run in report.runs:
        outs = [task.outs[run.label] for task in report.tasks if run.label in task.outs]
        text = (
            f"**{run.label}**: {run.model} ({run.format}, computed in {run.dtype}, "
            f"{run.folder_bytes:,} bytes in all files, sha256 {run.model_sha256[:16]}), "
            f"answers in {', '.join(dict.fromkeys([run.out, *outs]))}"
        )
        lines.append(f"- {plain_markdown(text)}")
    notes = (f"- {plain_markdown(note)}" for note in make_notes(report))
    lines += ["", "## How to read this", "", *notes, ""]
    return "\n".join(lines)


def make_table(report: Report) -> Table:
    """Return the comparison as a rich table."""
    table = Table(
        title=_describe_items(report), caption="brackets: 95 % intervals", box=box.SIMPLE_HEAD
    )
    table.add_column("", overflow="fold")
    for run in report.runs:
        table.add_column(run.label, justify="right", overflow="fold")
    for row in make_rows(report):
        table.add_row(row.name, *row.cells)
    return table


def make_rows(report: Report) -> list[Row]:
    """Return the measurements of a report, formatted, one row each."""
    rows = [
        _row(report, "weights, MB", lambda run: f"{run.weights_bytes / 1e6:.2f}"),
        _row(report, "weights, bytes", lambda run: f"{run.weights_bytes:,}"),
    ]
    for suite, score in report.runs[0].suites.items():
        scores = [run.suites.get(suite) for run in report.runs]
        name = f"{suite}: {score.metric}, %".replace("_", " ")
        cells = tuple(_NONE if found is None else _percent(found.score) for found in scores)
        rows.append(Row(name, cells))
        rows.append(Row(f"- minus {report.baseline}", tuple(_points(score) for score in scores)))
        if score.metric == TOKEN_PROBABILITY:
            cells = tuple(_NONE if found is None else _plain(found.perplexity) for found in scores)
            rows.append(Row(f"{suite}: perplexity".replace("_", " "), cells))
    if report.runs[0].suites:
        rows += [
            _row(report, "KL to teacher, nats", lambda run: _small(run.kl)),
            _row(report, "top-1 agreement, %", lambda run: _percent(run.top1)),
            _row(report, "sees the image", _gate),
        ]
    rows.append(_row(report, "verified", _verdict))
    return rows


def make_notes(report: Report) -> tuple[str, ...]:
    """Return how to read what a report has."""
    suites = _SUITE_NOTES if report.runs[0].suites else ()
    differing = (_DIFFERING.format("; ".join(report.differing)),) if report.differing else ()
    return (*differing, *suites, *(TASK_NOTES if report.tasks else ()))


_DIFFERING = (
    "Not asked in the same way: {}. Arithmetic alone moves answers, which no interval shows: "
    "differences are not of the weights alone."
)


_SUITE_NOTES = (
    "report.json has exact match, character error rate, ANLS, perplexity, KL, top-1 agreement and "
    "McNemar's test of every suite, unrounded.",
    "Differences are taken item by item over the same items, in percentage points, with a paired "
    "bootstrap interval; an interval that contains 0 shows no difference.",
    "KL is KL(teacher || model) per answer token, given the true answer so far; top-1 agreement "
    "is the share of those tokens at which both rank the same token first.",
    "The image gate asks the same questions with the right image, a grey one and another item's; "
    "it passes if the right one does better than both (McNemar, p < 0.05).",
)


def _row(report: Report, name: str, cell: Callable[[RunScore], str]) -> Row:
    return Row(name, tuple(cell(run) for run in report.runs))


def _markdown_tasks(report: Report, labels: Sequence[str]) -> list[str]:
    """Return the section of the harness's tasks, with a blank line at its end."""
    lines = [
        "## Tasks of the lm-evaluation-harness",
        "",
        f"{plain_markdown(describe_harness(report.tasks))}. ± is its standard error.",
        "",
        _markdown_line(["", *labels]),
        _markdown_line(["---", *("---:" for _ in labels)]),
    ]
    for task in make_task_rows(report.tasks, labels, report.baseline):
        lines.append(_markdown_line([f"**{task.task}**: {task.about}", *("" for _ in labels)]))
        lines += [_markdown_line([name, *cells]) for name, cells in task.rows]
    return [*lines, ""]


def _describe_items(report: Report) -> str:
    if report.num_items is None:
        return f"nvvl {report.nvvl_version}."
    return f"{report.num_items:,} items a suite, seed {report.seed}, nvvl {report.nvvl_version}."


def _percent(value: Interval | None) -> str:
    if value is None:
        return _NONE
    low, middle, high = (100 * v for v in (value.low, value.estimate, value.high))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _plain(value: Interval) -> str:
    middle, low, high = (
        f"{v:.4g}" if math.isfinite(v) else ">1e308"
        for v in (value.estimate, value.low, value.high)
    )
    return f"{middle} [{low}, {high}]"


def _points(suite: SuiteScore | None) -> str:
    if suite is None or suite.difference is None:
        return _NONE
    score = suite.difference.score
    return f"{_signed(score.estimate)} [{_signed(score.low)}, {_signed(score.high)}]"


def _signed(share: float) -> str:
    """Format a difference of shares as percentage points; what rounds to 0 has no sign."""
    text = f"{100 * share:+.1f}"
    return text if float(text) else "0.0"


def _small(value: Interval | None) -> str:
    if value is None:
        return _NONE
    return f"{value.estimate:.2g} [{value.low:.2g}, {value.high:.2g}]"


def _gate(run: RunScore) -> str:
    if run.gate is None:
        return _NONE
    rates = (run.gate.right, run.gate.blank, run.gate.other)
    verdict = {True: "yes", False: "NO", None: "too few items"}[run.gate.passed]
    return f"{verdict} ({' / '.join(f'{100 * rate.estimate:.1f}' for rate in rates)})"


def _verdict(run: RunScore) -> str:
    return {True: "yes", False: "NO", None: _NONE}[run.verified]


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"
