"""The report as one HTML page that needs nothing else: no network, no script, no other file.

The page says what was measured, how sure it is, where the runs differ, how the checkpoints were
made and whether they were proved. Everything is drawn from the runs and the checkpoints' own
records; what is not known is said to be unknown. Layout and style are in ``templates/``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from nvvl.reports.collect import Report, RunScore
from nvvl.reports.compare import recovery_percent
from nvvl.reports.curve_plots import plot_depth, plot_sweep
from nvvl.reports.evidence import Evidence
from nvvl.reports.examples import SuiteExamples, find_examples
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.harness_text import describe_harness, make_task_rows
from nvvl.reports.markdown import markdown_cell, markdown_code, plain_markdown
from nvvl.reports.plots import SHAPES, plot_forest, plot_noise, plot_sizes, shape_of
from nvvl.reports.published import PUBLISHED_TABLES
from nvvl.reports.render import make_notes, make_rows
from nvvl.reports.run import RunResult
from nvvl.reports.suites import SUITES

# The page grows by some 20 kB a question.
_EXAMPLES_IN_ALL = 18
_EXAMPLES_PER_SUITE = 6


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the head of the page says of a run.

    Attributes:
        size: of the weights, with its unit.
        size_percent: of the baseline's; None if that is 0.
        change: the lowest difference to the baseline, in words; empty for the baseline.
    """

    label: str
    size: str
    size_percent: float | None
    change: str
    verified: bool | None
    sees_the_image: bool | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the page says of where a run comes from.

    Attributes:
        answers: to suites; None where they were not asked.
        tasks: results of the harness.
        known: of the checkpoint.
    """

    score: RunScore
    answers: RunResult | None
    tasks: tuple[HarnessRun, ...]
    known: Evidence


def render_page(
    report: Report, runs: Sequence[RunResult | HarnessRun], evidence: Mapping[str, Evidence]
) -> str:
    """Return the HTML page of a comparison.

    Args:
        report: the comparison of these runs.
        runs: the runs, whose answers are shown side by side.
        evidence: what is known of their checkpoints, by label.
    """
    labels = [run.label for run in report.runs]
    proofs = {label: proof for label in labels if (proof := evidence[label].proof) is not None}
    return (
        open_templates()
        .get_template("report.html")
        .render(
            report=report,
            labels=labels,
            summaries=[_summarize(run, report.runs[0]) for run in report.runs],
            rows=make_rows(report),
            task_rows=make_task_rows(report.tasks, labels, report.baseline),
            harness=describe_harness(report.tasks),
            notes=make_notes(report),
            forest=plot_forest(report),
            sizes=plot_sizes(report),
            noise=plot_noise({label: proof.sqnr_db for label, proof in proofs.items()}, labels),
            depths=[plot_depth(depth) for depth in report.depths],
            sweeps=[plot_sweep(sweep) for sweep in report.sweeps],
            shapes=SHAPES,
            shape_of=shape_of,
            suites=_find_examples([run for run in runs if isinstance(run, RunResult)]),
            descriptions={name: suite.description for name, suite in SUITES.items()},
            runs=[_trace(score, runs, evidence[score.label]) for score in report.runs],
            published=PUBLISHED_TABLES,
        )
    )


def open_templates() -> Environment:
    """Return the templates of reports; HTML escapes what is put into it, Markdown where it says so.

    In Markdown, ``plain`` is for text of files in a line, ``cell`` in a cell of a table, and
    ``code`` as code.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"signed": signed, "words": lambda name: name.replace("_", " ")}
    environment.filters |= {"plain": plain_markdown, "cell": markdown_cell, "code": markdown_code}
    return environment


def signed(points: float) -> str:
    """Format a difference with its sign, to one decimal; what rounds to 0 has none."""
    text = f"{points:+.1f}"
    return (text if float(text) else "0.0").replace("-", "\N{MINUS SIGN}")


def format_size(num_bytes: int) -> str:
    """Format a size in decimal MB or GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 2e9 else f"{num_bytes / 1e6:.2f} MB"


def _find_examples(runs: Sequence[RunResult]) -> list[SuiteExamples]:
    if len(runs) < 2:
        return []
    num_suites = len(runs[0].settings.suites)
    per_suite = min(_EXAMPLES_PER_SUITE, max(1, _EXAMPLES_IN_ALL // num_suites))
    return find_examples(runs, per_suite=per_suite)


def _trace(score: RunScore, runs: Sequence[RunResult | HarnessRun], known: Evidence) -> Provenance:
    mine = [run for run in runs if run.label == score.label]
    return Provenance(
        score=score,
        answers=next((run for run in mine if isinstance(run, RunResult)), None),
        tasks=tuple(run for run in mine if isinstance(run, HarnessRun)),
        known=known,
    )


def _summarize(run: RunScore, baseline: RunScore) -> Summary:
    return Summary(
        label=run.label,
        size=format_size(run.weights_bytes),
        size_percent=recovery_percent(run.weights_bytes, baseline.weights_bytes),
        change=_describe_change(run),
        verified=run.verified,
        sees_the_image=None if run.gate is None else run.gate.passed,
    )


def _describe_change(run: RunScore) -> str:
    """Name the suite that a run does worst in, against the baseline."""
    changes = [
        (suite.difference.score, name)
        for name, suite in run.suites.items()
        if suite.difference is not None
    ]
    if not changes:
        return ""
    score, name = min(changes, key=lambda change: change[0].estimate)
    low, middle, high = (signed(100 * v) for v in (score.low, score.estimate, score.high))
    return f"{middle} [{low}, {high}] points in {name.replace('_', ' ')}"
