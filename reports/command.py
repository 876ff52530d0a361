"""The verbs ``nvvl evaluate``, ``sweep``, ``report``, ``demo`` and ``calib build``."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nvvl.errors import DataError
from nvvl.model.resolve import resolve_model
from nvvl.options import (
    EXIT_CHECK_FAILED,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    ResumableOverwriteOption,
    SeedOption,
    choose_device,
)
from nvvl.reports.json_values import MOST

if TYPE_CHECKING:
    from nvvl.reports.run import RunResult

ItemsOption = Annotated[int, typer.Option(min=1, help="Items of each suite.")]
TeacherOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="BF16 model to measure KL against.")
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Name in reports, once for each MODEL; else its folder's, or the end of a Hub id."
    ),
]
SweepKind = Literal["evs", "tiles", "depth"]
BatchOption = Annotated[int, typer.Option(min=1, max=MOST, help="Items asked at a time.")]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="BF16 or quantized checkpoints.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; each model gets one in it.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Suite to ask; may be given several times. Else line, key_value and both in "
            "unseen fonts; an unknown name lists all."
        ),
    ] = None,
    items: ItemsOption = 1000,
    teacher: TeacherOption = None,
    label: LabelOption = None,
    gate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Items of the first suite asked again with a blank and with a wrong image, to see "
            "that the model looks; 0 for none.",
        ),
    ] = 100,
    max_tiles: Annotated[
        int | None,
        typer.Option(min=1, help="Most tiles of an image, up to 1024; else the model's limit."),
    ] = None,
    pruning_rate: Annotated[
        float,
        typer.Option(metavar="RATE", help="Share of video tokens to prune (EVS), 0 to below 1."),
    ] = 0.0,
    batch: BatchOption = 32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: ResumableOverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask models the same generated questions and keep every answer; goes on where it stopped."""
    from nvvl.console import show_progress
    from nvvl.reports.evaluate import Candidate, Options
    from nvvl.reports.evaluate import evaluate as evaluate_models
    from nvvl.reports.publish import require_publishable
    from nvvl.reports.suites import DEFAULT_SUITES, find_suites

    names = name_models(models, label)
    runs = [
        Candidate(folder=path, out=out / name, label=name, pruning_rate=pruning_rate)
        for path, name in names.items()
    ]
    require_publishable(
        out, list(names.values()), runs=[run.out for run in runs], overwrite=overwrite
    )
    options = Options(
        num_items=items,
        batch_size=batch,
        seed=seed,
        gate_items=min(items, gate),
        device=choose_device(device),
        max_num_tiles=max_tiles,
    )
    with show_progress() as progress:
        results = evaluate_models(
            runs,
            find_suites(suite or DEFAULT_SUITES),
            options,
            teacher=None if teacher is None else resolve_model(teacher),
            overwrite=overwrite,
            progress=progress,
        )
    _show_report(results, out, as_json, overwrite=overwrite)


def sweep(
    kind: Annotated[
        SweepKind, typer.Argument(metavar="KIND", help="evs, tiles, or depth (needs --teacher).")
    ],
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="BF16 or quantized checkpoints.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Suite to ask; may be given several times. Else video for evs, page for tiles, "
            "line and key_value for depth; an unknown name lists all."
        ),
    ] = None,
    value: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of video tokens to prune, 0 to below 1, or most tiles, 1 to 1024; may be "
            "given several times, the one compared with first. "
            "Else 0, 0.25, 0.5, 0.75, 0.9 and 1, 4, 6, 12; limits that change no tile are left out."
        ),
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Items of each suite; else 1000, for depth 64.")
    ] = None,
    timed: Annotated[
        int | None, typer.Option(min=1, help="Items to time; else 8. Not for depth.")
    ] = None,
    teacher: TeacherOption = None,
    label: LabelOption = None,
    batch: BatchOption = 32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Discard answers that have other settings, and replace curves of other models, "
            "suites, values or settings; answers of the same settings are kept.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Change one setting and measure: evs prunes video tokens, tiles limits tiles; depth is noise.

    depth compares quantized models layer by layer with the BF16 one they were made from.
    """
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.reports.depth import measure_depth
    from nvvl.reports.evaluate import Options
    from nvvl.reports.suites import find_suites
    from nvvl.reports.sweep import run_sweep
    from nvvl.reports.sweep_text import depth_table, sweep_table

    candidates = {name: path for path, name in name_models(models, label).items()}
    source = None if teacher is None else resolve_model(teacher)
    suites = find_suites(suite) if suite else None
    device_name = choose_device(device)
    with show_progress() as progress:
        if kind == "depth":
            if source is None or value is not None or timed is not None:
                raise DataError(
                    "sweep depth: required --teacher, the BF16 source, and neither --value nor "
                    "--timed, for it changes no setting and takes no times"
                )
            measured = measure_depth(
                candidates,
                source,
                out,
                suites or find_suites(["line", "key_value"]),
                num_items=items or 64,
                batch_size=batch,
                seed=seed,
                device=device_name,
                overwrite=overwrite,
                progress=progress,
            )
            values, table = asdict(measured), depth_table(measured)
        else:
            swept = run_sweep(
                kind,
                candidates,
                out,
                Options(
                    num_items=items or 1000,
                    batch_size=batch,
                    seed=seed,
                    gate_items=0,
                    device=device_name,
                ),
                suites=suites,
                values=value,
                teacher=source,
                num_timed=timed or 8,
                overwrite=overwrite,
                progress=progress,
            )
            values, table = asdict(swept), sweep_table(swept)
    if as_json:
        print_json(values)
        return
    print_table(table)
    print(f"draw it: nvvl report RUN... --sweep {shlex.quote(str(out))}")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of nvvl evaluate and of nvvl lm-eval; the first is the baseline.",
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
    sweep: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of nvvl sweep; may be given several times."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files that nvvl report did not write, or that were changed since.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare runs item by item: a page, a card of each quantized checkpoint, JSON and a table."""
    _show_report(runs, out, as_json, proofs=proof or (), sweeps=sweep or (), overwrite=overwrite)


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo"),
    items: ItemsOption = 1000,
    short: Annotated[
        bool | None,
        typer.Option(
            "--short/--long",
            help="Without or with rotation, distillation and sweeps; else with them on AMD CPUs "
            "with bfloat16 units, where the whole was measured to end within ten minutes.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace what nvvl wrote there before, and files of the report that were changed; "
            "a demo with the same settings goes on without.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the embedded model to FP8 and NVFP4, distill, prove, evaluate, and print the table."""
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.cpu import bf16_speedup
    from nvvl.reports.demo import run_demo
    from nvvl.reports.render import make_table, to_json

    source = resolve_model("embedded")
    if short is None:  # 1: all products are slow; 6, with matrix units: all else is
        short = bf16_speedup() != 2
    with show_progress() as progress:
        result = run_demo(
            source, out, short=short, num_items=items, overwrite=overwrite, progress=progress
        )
    if as_json:
        print_json(to_json(result.report))
    else:
        print_table(make_table(result.report))
        for name, path in result.outputs.items():
            print(f"{name:13} {path}")
        print(*result.notes, sep="\n", end="\n" if result.notes else "")
    if not result.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def name_models(models: Sequence[str], labels: Sequence[str] | None) -> dict[Path, str]:
    """Return folder and label of each model; the label also names the folder of its run."""
    from nvvl.reports.run import check_label

    folders = [resolve_model(model).resolve() for model in models]
    names = list(map(_own_name, models, folders)) if labels is None else list(labels)
    if len(names) != len(folders):
        raise DataError(
            f"--label: required one for each of {len(folders)} models, got {len(names)}"
        )
    if len(set(names)) < len(names) or len(set(folders)) < len(folders):
        raise DataError(
            f"models: required different folders and names, got {', '.join(names)}; "
            "tell them apart with --label"
        )
    for name in names:
        check_label(name, "--label")
    return dict(zip(folders, names, strict=True))


def _own_name(model: str, folder: Path) -> str:
    """Return the name of a folder, or the end of a Hub id, whose folder is named by a commit."""
    return folder.name if Path(model).is_dir() else model.rpartition("/")[2]


def _show_report(
    runs: "Sequence[RunResult | Path]",
    out: Path,
    as_json: bool,
    *,
    proofs: Sequence[Path] = (),
    sweeps: Sequence[Path] = (),
    overwrite: bool,
) -> None:
    """Compare runs, write everything about them and print the tables."""
    from nvvl.console import print_json, print_table
    from nvvl.reports.harness_text import task_table
    from nvvl.reports.publish import publish
    from nvvl.reports.render import make_table, to_json

    published = publish(runs, out, proofs=proofs, sweeps=sweeps, overwrite=overwrite)
    if as_json:
        print_json(to_json(published.report))
        return
    compared = published.report
    print_table(make_table(compared))
    if compared.tasks:
        labels = [run.label for run in compared.runs]
        print_table(task_table(compared.tasks, labels, compared.baseline))
    print(*published.paths, sep="\n")


def build_calibration_set(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A TOML file, or the name of a ready spec.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokens are counted; else the spec's."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="Built set, folder or JSONL file that must not overlap, beside the suites of nvvl "
            "evaluate; may be given several times.",
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out bad items, and count them."),
    ] = False,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Keep items that are evaluated on, and record them."),
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build a calibration set from a spec: a folder that --calib and --data take.

    Ready specs: default, cnn-dailymail, nemotron-vlm-v2, paper-1024.
    """
    import os
    import time

    from nvvl.calib_data.build import build_set
    from nvvl.calib_data.spec import SetSpec, find_spec
    from nvvl.calib_data.summary import summary_tables
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.model.processor import Processor
    from nvvl.reports.overlap import kept_prints, own_sets, suite_sets

    file = find_spec(spec)
    read = SetSpec.from_toml(file)
    read = replace(read, model=model or read.model)
    start = time.perf_counter()
    with show_progress() as progress:
        manifest = build_set(
            read,
            out,
            base=file.parent,
            processor=Processor.from_folder(resolve_model(read.model, weights=False)),
            suites=suite_sets(),
            against=own_sets(against or ()),
            kept=kept_prints(),
            skip_bad=skip_bad,
            allow_overlap=allow_overlap,
            overwrite=overwrite,
            jobs=os.cpu_count() or 1,
            progress=progress,
        )
    if as_json:
        print_json(manifest)
        return
    for table in summary_tables(manifest):
        print_table(table)
    seconds = time.perf_counter() - start
    num_items = manifest["summary"]["num_items"]
    print(f"{out}: {num_items} items in {seconds:.1f} s, {num_items / seconds:.1f} items/s")
