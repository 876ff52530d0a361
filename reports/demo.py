"""The whole chain on one model: quantize, rotate, distill, prove, evaluate, compare.

    MODEL -> OUT/fp8 -> scales -> OUT/nvfp4 -> OUT/nvfp4-graphs -> OUT/nvfp4-engines
    MODEL -> OUT/rotated -> OUT/nvfp4-rotated -> OUT/nvfp4-qad      (not in a short one)
    all -> verified? -> OUT/runs/* -> OUT/report.html
    MODEL, OUT/nvfp4 -> OUT/sweeps/* -> OUT/report.html             (not in a short one)

Each step is the public call that the verb of the same name makes, so what the demo shows is what a
user gets. A demo that was interrupted goes on with the answers it has, and writes its quantized
folders again. ``demo.json`` says with which settings a folder was begun: one of other settings, or
that is not a demo's, is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from nvvl.calib_data.manifest import CalibrationSet, load_calibration_set
from nvvl.distill.execution import Execution
from nvvl.distill.presets import load_distill_recipe
from nvvl.distill.rotate import rotate
from nvvl.distill.train import distill
from nvvl.errors import OutputError, writing
from nvvl.export.verify import VerificationReport, verify
from nvvl.progress import Progress
from nvvl.quantize.presets import load_recipe
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.collect import Report
from nvvl.reports.curves import SweepKind
from nvvl.reports.demo_export import build_engines, export_graphs
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.evidence import PROOF_NAME
from nvvl.reports.journal import replace_text
from nvvl.reports.publish import publish, require_publishable
from nvvl.reports.run import RunResult, fingerprint
from nvvl.reports.suites import find_suites, require_items
from nvvl.reports.sweep import run_sweep

FORMATS = ("fp8", "nvfp4")
ROTATED, ROTATED_NVFP4 = "rotated", "nvfp4-rotated"
DISTILLED = "nvfp4-qad"
EXPORTED = "nvfp4"
SUITES = ("line", "key_value")
SWEPT = ("bf16", "nvfp4")
NUM_TIMED = 2  # questions of each point of a sweep
SETTINGS_NAME = "demo.json"

_COMMAND = ("nvvl", "demo")
# What the graphs and engines of a checkpoint are called among the outputs.
_GRAPHS, _ENGINES = "{} graphs", "{} engines"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What a demo has made.

    Attributes:
        report: The comparison, BF16 first.
        proofs: Verification of each quantized folder, by its name.
        outputs: What was written, by a word for it.
        notes: What was left out, and why.
    """

    report: Report
    proofs: dict[str, VerificationReport]
    outputs: dict[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every quantized folder was verified."""
        return all(proof.passed for proof in self.proofs.values())


def run_demo(
    source: Path,
    out: Path,
    *,
    short: bool = False,
    num_items: int = 1000,
    num_calibration_items: int = 256,
    num_distill_steps: int = 60,
    num_sweep_items: int = 50,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Quantize a model to FP8 and NVFP4, rotate and distill it a little, prove and compare.

    Args:
        source: A BF16 checkpoint folder.
        out: Folder to write; made if needed.
        short: Leave out rotation, distillation and sweeps.
        num_items: Items of each suite.
        num_calibration_items: Generated items that the scales are found on.
        num_distill_steps: Steps of distillation; few, to show the way and not the most it gives.
        num_sweep_items: Items asked at each point of the sweeps over video pruning and tiles.
        device: Where to compute.
        seed: Seed of calibration and evaluation items.
        overwrite: Replace what nvvl wrote into ``out`` before, with whatever settings.
        progress: Called as steps go on.

    Raises:
        OutputError: if ``out`` is a file, holds files but no demo, or one with other settings, or
            something that nvvl did not write is in the way.
        NvvlError: as the steps do.
    """
    settings = {
        "model_sha256": fingerprint(source),
        "items": num_items,
        "calibration items": num_calibration_items,
        "distillation steps": num_distill_steps,
        "sweep items": num_sweep_items,
        "device": device,
        "seed": seed,
    }
    require_items(find_suites(SUITES), num_items)
    _begin(out, settings, overwrite=overwrite)
    items = load_calibration_set("default", num_items=num_calibration_items, seed=seed)
    proofs: dict[str, VerificationReport] = {}
    built: dict[str, Path] = {}
    calibrated = out / FORMATS[0]
    for name in FORMATS:
        run = out / name
        stored = None if run == calibrated else calibrated
        _quantize(name, source, run, items, device, progress, stored=stored)
        if name == EXPORTED:
            built |= _deploy(run, progress)
        proofs[name] = _prove(run, source, built.get(_GRAPHS.format(name)), progress)
    notes = _say_what_is_missing(built)
    if short:
        notes += ("rotation, distillation and sweeps: left out, nvvl demo --long has them",)
    else:
        proofs |= _improve(
            source,
            out,
            items,
            num_steps=num_distill_steps,
            device=device,
            seed=seed,
            progress=progress,
        )
        built["rotated BF16"] = out / ROTATED
    quantized = {name: out / name for name in proofs}
    folders = {"bf16": source, **quantized}
    gate_items = min(num_items, Options.gate_items)
    options = Options(num_items=num_items, seed=seed, gate_items=gate_items, device=device)
    runs = _evaluate(folders, source, out / "runs", options, progress)
    built["answers"] = out / "runs"
    sweeps: list[Path] = []
    if not short:
        sweeps = _sweep(
            {name.upper(): folders[name] for name in SWEPT},
            source,
            out / "sweeps",
            Options(num_items=num_sweep_items, seed=seed, gate_items=0, device=device),
            progress,
        )
        built["sweeps"] = out / "sweeps"
    published = publish(
        runs,
        out,
        proofs=[out / PROOF_NAME.format(name) for name in proofs],
        sweeps=sweeps,
        overwrite=overwrite,
    )
    outputs = quantized | built | {"data": published.data, "report": published.page}
    return DemoResult(report=published.report, proofs=proofs, outputs=outputs, notes=notes)


def _begin(out: Path, settings: Mapping[str, object], *, overwrite: bool) -> None:
    """Refuse a folder that is not of this demo, and note whose it is."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: required a folder for the demo, got a file; give another --out")
    path = out / SETTINGS_NAME
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(out.iterdir()):
            difference = _describe_difference(path, settings)
            if difference is not None:
                raise OutputError(f"{out}: {difference}; give another --out, or say --overwrite")
    names = ("bf16", *FORMATS, ROTATED_NVFP4, DISTILLED)
    require_publishable(out, [name.upper() for name in names], overwrite=overwrite)
    replace_text(path, json.dumps(settings, indent=2) + "\n")


def _describe_difference(path: Path, settings: Mapping[str, object]) -> str | None:
    """Say why what a folder holds is not this demo's; None if it is."""
    if not path.is_file():
        return f"required a new or empty folder, or that of a demo, which has {path.name}"
    try:
        present = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        present = None
    if not isinstance(present, dict):
        return f"its {path.name} is not of a demo"
    for name, asked in settings.items():
        if present.get(name) != asked:
            return f"holds a demo with {name} {present.get(name)!s:.80}, asked for {asked}"
    return None


def _improve(
    source: Path,
    out: Path,
    items: CalibrationSet,
    *,
    num_steps: int,
    device: str,
    seed: int,
    progress: Progress | None,
) -> dict[str, VerificationReport]:
    """Write NVFP4 of the rotated model, plain and distilled; return the proofs of both."""
    rotated, run, distilled = (out / name for name in (ROTATED, ROTATED_NVFP4, DISTILLED))
    _rotate(source, rotated, items, device=device, seed=seed, progress=progress)
    _quantize("nvfp4", rotated, run, items, device, progress)
    proofs = {ROTATED_NVFP4: _prove(run, rotated, None, progress)}
    trained = _distill(
        run, rotated, distilled, num_steps=num_steps, device=device, seed=seed, progress=progress
    )
    return proofs | {DISTILLED: _prove(distilled, trained, None, progress)}


def _quantize(
    recipe_name: str,
    source: Path,
    out: Path,
    items: CalibrationSet,
    device: str,
    progress: Progress | None,
    *,
    stored: Path | None = None,
) -> None:
    """Write a checkpoint in the format of a preset, with the calibration of another if given."""
    recipe = replace(load_recipe(recipe_name), num_calibration_items=items.num_requested)
    quantize_checkpoint(
        source,
        out,
        recipe,
        items if stored is None else None,
        device=device,
        overwrite=True,
        progress=_within(f"quantize {out.name}", progress),
        command=_COMMAND,
        from_calibration=stored,
    )


def _prove(
    run: Path, source: Path, graphs: Path | None, progress: Progress | None
) -> VerificationReport:
    """Verify a checkpoint, and its graphs if there are any; the proof is written beside it."""
    proof = verify(run, source, graphs=graphs, progress=_within(f"verify {run.name}", progress))
    proof.write_report(run.parent / PROOF_NAME.format(run.name))
    return proof


def _deploy(run: Path, progress: Progress | None) -> dict[str, Path]:
    """Write the graphs and the engines of a checkpoint, as far as their libraries are there."""
    built: dict[str, Path] = {}
    graphs = export_graphs(run, progress=_within(f"graphs of {run.name}", progress))
    if graphs is None:
        return built
    built[_GRAPHS.format(run.name)] = graphs
    engines = build_engines(run, graphs, progress=_within(f"engines of {run.name}", progress))
    if engines is not None:
        built[_ENGINES.format(run.name)] = engines
    return built


def _say_what_is_missing(built: Mapping[str, Path]) -> tuple[str, ...]:
    """Say which extra brings what could not be built."""
    extras = {_GRAPHS.format(EXPORTED): "onnx", _ENGINES.format(EXPORTED): "onnx,tensorrt-rtx"}
    return tuple(
        f"{name}: not built, needs pip install 'nvvl[{extra}]'"
        for name, extra in extras.items()
        if name not in built
    )


def _rotate(
    source: Path,
    out: Path,
    items: CalibrationSet,
    *,
    device: str,
    seed: int,
    progress: Progress | None,
) -> None:
    """Write an equal model that is easier to round."""
    rotate(
        source,
        out,
        items,
        num_held_out=max(1, items.num_requested // 8),
        seed=seed,
        device=device,
        overwrite=True,
        progress=_within("rotate", progress),
        command=_COMMAND,
    )


def _distill(
    run: Path,
    source: Path,
    out: Path,
    *,
    num_steps: int,
    device: str,
    seed: int,
    progress: Progress | None,
) -> Path:
    """Train a run towards its source for a few steps; returns the BF16 weights that came out."""
    recipe = replace(
        load_distill_recipe("qad_nvfp4_embedded"),
        num_steps=num_steps,
        validate_every=max(1, num_steps // 2),
        num_validation_items=48,
        ema_decay=0.9,  # a shorter memory for fewer steps
    )
    items = load_calibration_set("default", num_items=recipe.num_items, seed=seed)
    execution = Execution(
        device=device,
        overwrite=True,
        progress=_within(f"distill {run.name}", progress),
        command=_COMMAND,
    )
    result = distill(run, source, out, recipe, items, seed=seed, execution=execution)
    assert result is not None, "a demo is one process"
    return result.bf16


def _evaluate(
    folders: Mapping[str, Path],
    teacher: Path,
    out: Path,
    options: Options,
    progress: Progress | None,
) -> list[RunResult]:
    """Ask all models the questions of the suites; each has a folder of its name in ``out``."""
    candidates = [
        Candidate(folder=folder, out=out / name, label=name.upper())
        for name, folder in folders.items()
    ]
    return evaluate(
        candidates,
        find_suites(SUITES),
        options,
        teacher=teacher,
        overwrite=True,
        progress=_within("evaluate", progress),
    )


def _sweep(
    candidates: Mapping[str, Path],
    teacher: Path,
    out: Path,
    options: Options,
    progress: Progress | None,
) -> list[Path]:
    """Measure what pruned videos and fewer tiles cost; returns the folder of each sweep."""
    folders: dict[SweepKind, Path] = {kind: out / kind for kind in get_args(SweepKind)}
    for kind, folder in folders.items():
        run_sweep(
            kind,
            candidates,
            folder,
            options,
            teacher=teacher,
            num_timed=NUM_TIMED,
            overwrite=True,
            progress=_within(f"sweep {kind}", progress),
        )
    return list(folders.values())


def _within(step: str, progress: Progress | None) -> Progress | None:
    """Put the name of the step before what it reports."""
    if progress is None:
        return None
    return lambda stage, num_done, num_all: progress(f"{step}: {stage}", num_done, num_all)
