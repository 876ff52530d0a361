"""What better checkpoints win back of what plain quantization lost.

    nvvl evaluate embedded nvfp4 qad --teacher embedded -o runs --suite line --suite key_value
    python -m nvvl.benchmarks.recovery runs/embedded runs/nvfp4 runs/qad

Takes runs of BF16, of plain quantization (PTQ) and of what is compared with it, which were asked
the same items. Of each suite, and of all items together: KL to BF16, its ratio to PTQ's and its
difference, exact match less PTQ's and less BF16's in points, with paired 95 % intervals, and the
share of the loss that came back.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nvvl.reports.comparable import require_comparable
from nvvl.reports.compare import (
    Interval,
    bootstrap_intervals,
    bootstrap_ratio,
    paired_difference,
    recovery_percent,
)
from nvvl.reports.run import RunResult, load_run

ALL = "all"
# Nats: an item whose answer is as good as certain may come out at zero, by which nothing divides.
LEAST_KL = 1e-9


def compare(runs: Sequence[RunResult]) -> list[dict[str, object]]:
    """Return one row a suite and run: BF16 and PTQ first in ``runs``, no row for BF16.

    Raises:
        DataError: if the runs were not asked the same items.
    """
    require_comparable(runs)
    rows: list[dict[str, object]] = []
    for suite in (*runs[0].settings.suites, ALL):
        answers = [
            [a for a in run.answers if a.condition == "right" and suite in (a.suite, ALL)]
            for run in runs
        ]
        kl = [np.maximum(np.array([a.kl for a in row], float), LEAST_KL) for row in answers]
        right = [np.array([a.correct for a in row], float) for row in answers]
        lost = right[0].mean() - right[1].mean()
        for run, own_kl, own_right in zip(runs[1:], kl[1:], right[1:], strict=True):
            row: dict[str, object] = {"suite": suite, "run": run.label}
            (row["kl"],) = bootstrap_intervals(own_kl[:, None])
            row["less_bf16"] = paired_difference(right[0], own_right)
            if run is not runs[1]:
                row["kl_ratio"] = bootstrap_ratio(own_kl, kl[1])
                row["kl_less_ptq"] = paired_difference(kl[1], own_kl)
                row["less_ptq"] = paired_difference(right[1], own_right)
                won = own_right.mean() - right[1].mean()
                row["recovered"] = recovery_percent(won, lost) if lost > 0 else None
            rows.append(row)
    return rows


def to_markdown(rows: Sequence[dict[str, object]]) -> str:
    """Return the rows as a table; exact match in points."""
    lines = [
        "| suite | | KL to BF16 | times PTQ's | less PTQ's "
        "| exact match less PTQ, points | less BF16, points | recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        recovered = row.get("recovered")
        cells = [
            row["suite"],
            row["run"],
            show(row["kl"], "{:.4f}"),
            show(row.get("kl_ratio"), "{:.3f}"),
            show(row.get("kl_less_ptq"), "{:+.4f}"),
            show(row.get("less_ptq"), "{:+.2f}", 100),
            show(row["less_bf16"], "{:+.2f}", 100),
            "" if recovered is None else f"{recovered:.0f} %",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def show(interval: object, form: str, factor: float = 1) -> str:
    if not isinstance(interval, Interval):
        return ""
    low, high = (form.format(factor * end) for end in (interval.low, interval.high))
    return f"{form.format(factor * interval.estimate)} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders: BF16, PTQ, others")
    arguments = parser.parse_args()
    if len(arguments.runs) < 3:
        parser.error(
            f"required runs of BF16, PTQ and at least one other, got {len(arguments.runs)}"
        )
    runs = [load_run(folder) for folder in arguments.runs]
    print(f"{runs[0].settings.num_items} items a suite")
    print(to_markdown(compare(runs)))


if __name__ == "__main__":
    main()
