"""A Hub model card of a quantized checkpoint, with the numbers that were measured.

The card is written beside the report, not into the checkpoint: the folder is what was proved, and
a file put into it would be a file that its manifest does not know. Copy it there when you publish.
What the checkpoint does not record (its licence, the Hub id of its source) is left as a comment to
fill in, never guessed.
"""

import json

from nvvl.reports.collect import Report, RunScore
from nvvl.reports.compare import recovery_percent
from nvvl.reports.evidence import Evidence
from nvvl.reports.harness_text import describe_harness, make_task_rows, name_metric
from nvvl.reports.page import format_size, open_templates
from nvvl.reports.render import make_notes, make_rows


def render_card(report: Report, run: RunScore, evidence: Evidence) -> str:
    """Return the ``README.md`` of a run's checkpoint.

    Args:
        report: the comparison the run is part of.
        run: one of its runs other than the baseline.
        evidence: what is known of the checkpoint.

    Raises:
        ValueError: if nvvl did not quantize the checkpoint, so no recipe of it is known.
    """
    if evidence.manifest is None or evidence.recipe is None:
        raise ValueError(f"{run.label}: required a checkpoint that nvvl quantized")
    place = report.runs.index(run)
    tasks = [task for task in report.tasks if run.label in task.outs]
    return (
        open_templates()
        .get_template("card.md")
        .render(
            report=report,
            run=run,
            manifest=evidence.manifest,
            recipe=evidence.recipe,
            proof=evidence.proof,
            num_linears=evidence.num_linears,
            source_sha256=evidence.source_sha256,
            changes=evidence.changes,
            size=format_size(run.weights_bytes),
            size_percent=recovery_percent(run.weights_bytes, report.runs[0].weights_bytes),
            baseline_size=format_size(report.runs[0].weights_bytes),
            rows=[(row.name, row.cells[0], row.cells[place]) for row in make_rows(report)],
            tasks=tasks,
            task_rows=make_task_rows(tasks, [report.baseline, run.label], report.baseline),
            harness=describe_harness(tasks),
            name_metric=name_metric,
            notes=make_notes(report),
            quote=json.dumps,  # a JSON string is a YAML string
        )
    )
