"""Results of the harness as a table for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from nvvl.reports.harness import HarnessRun, Metric


def harness_table(runs: Sequence[HarnessRun]) -> Table:
    """Return a row for each metric of each task, a column for each model.

    Args:
        runs: of the same tasks.
    """
    first = runs[0].settings
    title = f"lm-eval {first['lm_eval_version']}, {first['dtype']} on {first['device']}"
    table = Table(
        title=title if first["limit"] is None else f"{title}, first {first['limit']:,} items",
        caption="± is the harness's standard error",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("task", overflow="fold")
    table.add_column("items", justify="right")
    table.add_column("metric", overflow="fold")
    for run in runs:
        table.add_column(run.label, justify="right", overflow="fold")
    for place, result in enumerate(runs[0].results):
        for number, metric in enumerate(result.metrics):
            name = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            table.add_row(
                result.task,
                "" if result.num_items is None else f"{result.num_items:,}",
                name,
                *(_number(run.results[place].metrics[number]) for run in runs),
            )
    return table


def _number(metric: Metric) -> str:
    if metric.stderr is None:
        return f"{metric.value:.4f}"
    return f"{metric.value:.4f} ± {metric.stderr:.4f}"
