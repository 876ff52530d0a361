"""The verbs ``nvvl evaluate``, ``nvvl report`` and ``nvvl demo``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nvvl.options import (
    EXIT_CHECK_FAILED,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    SeedOption,
    choose_device,
)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="BF16 or quantized checkpoints.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; each model gets one in it.")],
    suite: Annotated[
        list[str] | None, typer.Option(help="Suite to ask; may be given several times.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of each suite.")] = 1000,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="BF16 model to measure KL against.")
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask models the same generated questions and keep every answer; goes on where it stopped."""
    from nvvl.console import show_progress
    from nvvl.model.load import resolve_model
    from nvvl.reports.evaluate import Candidate, Options
    from nvvl.reports.evaluate import evaluate as evaluate_models
    from nvvl.reports.suites import DEFAULT_SUITES, find_suites

    folders = [resolve_model(model).resolve() for model in models]
    runs = [Candidate(folder=path, out=out / path.name, label=path.name) for path in folders]
    gate_items = min(items, Options.gate_items)
    options = Options(
        num_items=items, seed=seed, gate_items=gate_items, device=choose_device(device)
    )
    with show_progress() as progress:
        evaluate_models(
            runs,
            find_suites(suite or DEFAULT_SUITES),
            options,
            teacher=None if teacher is None else resolve_model(teacher),
            overwrite=overwrite,
            progress=progress,
        )
    _show_report([run.out for run in runs], out, as_json)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of nvvl evaluate; the first is compared to."
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the report, or its page: NAME.html.")
    ] = Path("report"),
    proof: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output of nvvl verify --json; may be given several times. "
            "verify-NAME.json beside a checkpoint NAME is found without."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs item by item: a page, a model card of each checkpoint, JSON and a table."""
    _show_report(runs, out, as_json, proofs=proof or ())


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo"),
    items: Annotated[int, typer.Option(min=1, help="Items of each suite.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Take the embedded model to FP8 and NVFP4, prove both, evaluate, and print the table."""
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.model.load import resolve_model
    from nvvl.reports.demo import run_demo
    from nvvl.reports.render import make_table

    source = resolve_model("embedded")
    with show_progress() as progress:
        result = run_demo(source, out, num_items=items, progress=progress)
    if as_json:
        print_json(asdict(result.report))
    else:
        print_table(make_table(result.report))
        for name, path in result.outputs.items():
            print(f"{name:8} {path}")
    if not result.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _show_report(
    runs: Sequence[Path], out: Path, as_json: bool, *, proofs: Sequence[Path] = ()
) -> None:
    """Compare runs, write everything about them and print the table."""
    from nvvl.console import print_json, print_table
    from nvvl.reports.publish import publish
    from nvvl.reports.render import make_table

    published = publish(runs, out, proofs=proofs)
    if as_json:
        print_json(asdict(published.report))
        return
    print_table(make_table(published.report))
    print(*published.paths, sep="\n")
