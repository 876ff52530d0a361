"""Everything that is written about some runs: numbers, page and model cards.

RUN... -> report.html   the page to look at
          report.json   the numbers, unrounded; report.schema.json says what is in it
          report.md     the table
          cards/LABEL/README.md   a model card of each checkpoint that nvvl quantized

Of what is there already, only files that nvvl wrote and nobody changed (`nvvl.reports.sealed`) are
replaced without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from nvvl.errors import DataError, OutputError, require_unread, writing
from nvvl.reports.card import render_card
from nvvl.reports.collect import Report, collect
from nvvl.reports.comparable import RUN_FILES, load_runs
from nvvl.reports.curves import CurveKind, curves_path
from nvvl.reports.evidence import gather_evidence
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.journal import replace_bytes
from nvvl.reports.page import render_page
from nvvl.reports.render import render_json, render_markdown
from nvvl.reports.run import RunResult
from nvvl.reports.sealed import require_own, seal

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


class _Places(NamedTuple):
    """Where the files of a report go; cards are in a folder of their label."""

    page: Path
    table: Path
    data: Path
    cards: Path

    @classmethod
    def of(cls, out: Path) -> "_Places":
        folder, name = (out.parent, out.stem) if out.suffix == PAGE_SUFFIX else (out, "report")
        page, table, data = (folder / f"{name}{suffix}" for suffix in (PAGE_SUFFIX, ".md", ".json"))
        return cls(page=page, table=table, data=data, cards=folder / "cards")

    def card(self, label: str) -> Path:
        return self.cards / label / "README.md"


def require_publishable(
    out: Path, labels: Sequence[str], *, runs: Sequence[Path] = (), overwrite: bool = False
) -> None:
    """Refuse what would keep a report from being written, before its runs are made.

    Args:
        out: as of `publish`.
        labels: of the runs, the baseline first.
        runs: folders that are to be made for them.
        overwrite: replace files that nvvl did not write, or that were changed since.

    Raises:
        DataError: if a run would lie where the report goes.
        OutputError: if ``out`` is a file, or files or folders are in the way.
    """
    places = _Places.of(out)
    for run in runs:
        for place in places:
            if place in (run, *run.parents):
                raise DataError(
                    f"{run}: a run cannot lie there, for {place.name} of the report does; choose "
                    "another --label or --out"
                )
    folder = places.cards.parent
    with writing(out):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: required a folder for the report, got a file")
        for path in (*places[:3], *map(places.card, labels[1:])):
            if path.is_dir():
                raise OutputError(
                    f"{path}: required a file of the report, got a folder; give another --out"
                )
            if not overwrite:
                require_own(path)


def publish(
    runs: Sequence[RunResult | HarnessRun | Path],
    out: Path,
    *,
    proofs: Sequence[Path] = (),
    sweeps: Sequence[Path] = (),
    overwrite: bool = False,
) -> Publication:
    """Compare runs with the first and write page, numbers, table and model cards.

    Args:
        runs: finished runs, or their folders.
        out: folder, made if needed, or the page itself if it ends in ``.html``; the other files
            are then beside it under the same name.
        proofs: JSON files of ``nvvl verify --json``; ``verify-NAME.json`` beside a checkpoint
            ``NAME`` is found without.
        sweeps: folders of ``nvvl sweep``.
        overwrite: replace files that nvvl did not write, or that were changed since.

    Raises:
        DataError: as `load_runs`, `collect` and `gather_evidence`.
        OutputError: as `require_publishable`, if a file would take the place of one that is read,
            or if something cannot be written.
    """
    loaded = load_runs(runs)
    labels = list(dict.fromkeys(run.label for run in loaded))
    places = _Places.of(out)
    read = [run.out / name for run in loaded for name in RUN_FILES]
    read += [curves_path(kind, folder) for folder in sweeps for kind in get_args(CurveKind)]
    for path in places[:3]:
        require_unread(path, [*read, *proofs])
    require_publishable(out, labels, overwrite=overwrite)
    evidence = gather_evidence(loaded, proofs)
    verified = {
        label: known.proof.passed for label, known in evidence.items() if known.proof is not None
    }
    report = collect(loaded, verified=verified, curves=sweeps)
    quantized = [run for run in report.runs[1:] if evidence[run.label].recipe is not None]
    cards = {run.label: places.card(run.label) for run in quantized}
    contents = {
        places.data: render_json(report).encode(),
        places.table: seal(render_markdown(report)),
        places.page: seal(render_page(report, loaded, evidence)),
    }
    for run in quantized:
        contents[cards[run.label]] = seal(render_card(report, run, evidence[run.label]))
    for path, content in contents.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content)
    return Publication(
        report=report, page=places.page, data=places.data, table=places.table, cards=cards
    )
