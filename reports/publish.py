"""Everything that is written about some runs: numbers, page and model cards.

RUN... -> report.html   the page to look at
          report.json   the numbers, unrounded; report.schema.json says what is in it
          report.md     the table
          cards/LABEL/README.md   a model card of each checkpoint that nvvl quantized
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvvl.errors import writing
from nvvl.reports.card import render_card
from nvvl.reports.collect import Report, collect
from nvvl.reports.comparable import load_runs
from nvvl.reports.evidence import gather_evidence
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.page import render_page
from nvvl.reports.render import write_report
from nvvl.reports.run import RunResult

PAGE_SUFFIX = ".html"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was written.

    Attributes:
        cards: by run label.
    """

    report: Report
    page: Path
    data: Path
    table: Path
    cards: dict[str, Path]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file, the page first."""
        return (self.page, self.table, self.data, *self.cards.values())


def publish(
    runs: Sequence[RunResult | HarnessRun | Path],
    out: Path,
    *,
    proofs: Sequence[Path] = (),
    sweeps: Sequence[Path] = (),
) -> Publication:
    """Compare runs with the first and write page, numbers, table and model cards.

    Args:
        runs: finished runs, or their folders.
        out: folder, made if needed, or the page itself if it ends in ``.html``; the other files
            are then beside it under the same name.
        proofs: JSON files of ``nvvl verify --json``; ``verify-NAME.json`` beside a checkpoint
            ``NAME`` is found without.
        sweeps: folders of ``nvvl sweep``.

    Raises:
        DataError: as `load_runs`, `collect` and `gather_evidence`.
        OutputError: if something cannot be written.
    """
    loaded = load_runs(runs)
    evidence = gather_evidence(loaded, proofs)
    verified = {
        label: known.proof.passed for label, known in evidence.items() if known.proof is not None
    }
    report = collect(loaded, verified=verified, curves=sweeps)
    is_page = out.suffix == PAGE_SUFFIX
    folder, name = (out.parent, out.stem) if is_page else (out, "report")
    data, table = write_report(report, folder, name=name)
    page = folder / f"{name}{PAGE_SUFFIX}"
    _write(page, render_page(report, loaded, evidence))
    cards = {}
    for run in report.runs[1:]:
        if evidence[run.label].recipe is not None:
            cards[run.label] = folder / "cards" / run.label / "README.md"
            _write(cards[run.label], render_card(report, run, evidence[run.label]))
    return Publication(report=report, page=page, data=data, table=table, cards=cards)


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="backslashreplace"))  # file names may be no UTF-8
