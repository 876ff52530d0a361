"""Accuracy against speed while one setting changes: how much of a video, or of a page, is shown.

`evs`    Efficient Video Sampling drops 0, 25, 50, 75 and 90 % of the image tokens of each video.
`tiles`  An image is cut into at most 1, 4, 6 and 12 tiles; a limit under which every image has the
         tiles of another limit asks nothing new, and is left out.

Every point is a run of its own, a folder ``OUT/LABEL/KIND-VALUE`` with every answer, so a sweep
that was interrupted goes on, and any two points can be compared by ``nvvl report``. Times are taken
again on each call. ``OUT/sweep-KIND.json`` has the curves; ``nvvl report --sweep OUT`` draws them.

The paper's own table of EVS (arXiv 2511.03929, figure 4) has the same columns, from 128 frames on a
GPU; the generated videos have 4 to 8 frames.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nvvl
from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.config import MOST_TILES, VLMConfig
from nvvl.model.processor import Processor
from nvvl.model.tiling import choose_grid
from nvvl.progress import Progress, Ticker
from nvvl.quantize.load import load_any
from nvvl.reports.compare import bootstrap_intervals, paired_difference
from nvvl.reports.curves import (
    CurvePlan,
    Point,
    Speed,
    Sweep,
    SweepKind,
    make_curves_folder,
    require_replaceable,
    write_curves,
)
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.journal import keeping_answers
from nvvl.reports.question import prepare_question
from nvvl.reports.run import RunResult
from nvvl.reports.suites import Suite, find_suites, require_items
from nvvl.reports.timing import Contender, describe_machine, measure_speed

VALUES: Mapping[SweepKind, tuple[float, ...]] = {
    "evs": (0.0, 0.25, 0.5, 0.75, 0.9),
    "tiles": (1, 4, 6, 12),
}
SUITES_OF: Mapping[SweepKind, tuple[str, ...]] = {"evs": ("video",), "tiles": ("page",)}


def run_sweep(
    kind: SweepKind,
    candidates: Mapping[str, Path],
    out: Path,
    options: Options,
    *,
    suites: Sequence[Suite] | None = None,
    values: Sequence[float] | None = None,
    teacher: Path | None = None,
    num_timed: int = 8,
    num_new_tokens: int = 32,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Evaluate models at each value of a setting, time them, and write ``sweep-KIND.json``.

    Args:
        kind: which setting.
        candidates: folder of each model, by label.
        out: folder of the sweep.
        options: how models are asked; the image gate is left out.
        suites: what is asked; by default a video or a page.
        values: of the setting, the one compared with first.
        teacher: BF16 model to measure KL against.
        num_timed: questions to time.
        num_new_tokens: tokens to write to each of them.
        overwrite: discard runs with other settings, and curves of other models, suites, values or
            settings.
        progress: called as `evaluate` does.

    Raises:
        DataError: if a suite has no videos to prune or fewer items, a value is out of range or
            given twice, or images have the same tiles under all limits.
        OutputError: if curves of other models, suites, values or settings are there, and as
            `evaluate` does.
        ConfigError, CheckpointError: as `evaluate` does.
        KeyboardInterrupt: again, saying how to go on.
    """
    suites = suites or find_suites(SUITES_OF[kind])
    values = values or VALUES[kind]
    _check_values(kind, values)
    _check_media(kind, suites)
    require_items(suites, options.num_items)
    num_timed = min(num_timed, options.num_items)
    plan = CurvePlan(
        kind=kind,
        labels=tuple(candidates),
        suites=tuple(suite.name for suite in suites),
        values=tuple(values),
        num_items=options.num_items,
        num_timed=num_timed,
        seed=options.seed,
        dtype=str(options.dtype).removeprefix("torch."),
    )
    make_curves_folder(kind, out)
    require_replaceable(plan, out, overwrite=overwrite)
    options = replace(options, gate_items=0)
    notes: tuple[str, ...] = ()
    if kind == "tiles":
        tile_size = VLMConfig.from_folder(next(iter(candidates.values()))).image_size
        values, notes = _leave_out_equals(suites, options, values, tile_size, progress)
        for note in notes:
            print(note, file=sys.stderr)
    with keeping_answers(out):
        runs = _run_all(
            kind, candidates, out, options, suites, values, teacher, overwrite, progress
        )
        speeds = _time_all(kind, candidates, options, suites, values, num_timed, num_new_tokens)
    sweep = Sweep(
        kind=kind,
        metrics={suite.name: suite.metric for suite in suites},
        points=tuple(
            _make_point(label, suite.name, value, runs, values[0], speeds[suite.name, label, value])
            for suite in suites
            for label in candidates
            for value in values
        ),
        num_items=plan.num_items,
        num_timed=num_timed,
        seed=plan.seed,
        dtype=plan.dtype,
        machine=describe_machine(options.device),
        nvvl_version=nvvl.__version__,
        notes=notes,
    )
    write_curves(sweep, out)
    return sweep


def _leave_out_equals(
    suites: Sequence[Suite],
    options: Options,
    limits: Sequence[float],
    tile_size: int,
    progress: Progress | None,
) -> tuple[list[float], tuple[str, ...]]:
    """Return the limits that give other tiles than those before, and notes of what stays equal."""
    groups = [0] * len(limits)  # of limits that are alike so far
    num_equal = dict.fromkeys((suite.name for suite in suites), 0)
    ticker = Ticker(progress, total=len(suites) * options.num_items)
    for suite in suites:
        ticker.stage = f"tiles of {suite.name}"
        for item in suite.items(options.num_items, seed=options.seed):
            row = [_choose_grids(item, tile_size, int(limit)) for limit in limits]
            num_equal[suite.name] += len(set(row)) == 1
            numbers: dict[object, int] = {}
            pairs = zip(groups, row, strict=True)
            groups = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
            ticker.tick()
    alike: dict[int, list[float]] = {}
    for limit, group in zip(limits, groups, strict=True):
        alike.setdefault(group, []).append(limit)
    if len(alike) == 1 < len(limits):
        raise DataError(
            f"sweep tiles: required limits that differ, got {_join(limits)}, under which every "
            f"image has the same tiles of {tile_size} px; give others with --value, or another "
            "--suite"
        )
    notes = [
        f"most tiles {_join(others)}: left out, every image has the same tiles as under {first:g}"
        for first, *others in alike.values()
        if others
    ]
    if len(alike) > 1:
        for name, count in num_equal.items():
            if count:
                share = f"{count:,} of {options.num_items:,} items"
                notes.append(f"{name}: {share} have the same tiles under every limit")
    return [first for first, *_ in alike.values()], tuple(notes)


def _choose_grids(item: Item, tile_size: int, limit: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        choose_grid(*image.size, tile_size=tile_size, max_num_tiles=limit) for image in item.images
    )


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _run_all(
    kind: SweepKind,
    candidates: Mapping[str, Path],
    out: Path,
    options: Options,
    suites: Sequence[Suite],
    values: Sequence[float],
    teacher: Path | None,
    overwrite: bool,
    progress: Progress | None,
) -> dict[tuple[str, float], RunResult]:
    """Return the run of each model and value."""
    keys = [(label, value) for value in values for label in candidates]
    members = {
        (label, value): Candidate(
            folder=candidates[label],
            out=out / label / f"{kind}-{value:g}",
            label=f"{label} {kind} {value:g}",
            pruning_rate=value if kind == "evs" else 0.0,
        )
        for label, value in keys
    }
    # Pruned videos share one encoding; other tiles are other pixels.
    groups = (
        [keys] if kind == "evs" else [[(k, v) for k, v in keys if v == value] for value in values]
    )
    runs: dict[tuple[str, float], RunResult] = {}
    for group in groups:
        tiles = options.max_num_tiles if kind == "evs" else int(group[0][1])
        results = evaluate(
            [members[key] for key in group],
            suites,
            replace(options, max_num_tiles=tiles),
            teacher=teacher,
            overwrite=overwrite,
            progress=progress,
        )
        runs.update(zip(group, results, strict=True))
    return runs


def _time_all(
    kind: SweepKind,
    candidates: Mapping[str, Path],
    options: Options,
    suites: Sequence[Suite],
    values: Sequence[float],
    num_timed: int,
    num_new_tokens: int,
) -> dict[tuple[str, str, float], Speed]:
    """Return the speed of each suite, model and value."""
    models = {
        label: load_any(folder, dtype=options.dtype, device=options.device)
        for label, folder in candidates.items()
    }
    processor = Processor.from_folder(next(iter(candidates.values())))
    speeds: dict[tuple[str, str, float], Speed] = {}
    for suite in suites:
        items = list(suite.items(num_timed, seed=options.seed))
        contenders = {}
        for value in values:
            tiles = options.max_num_tiles if kind == "evs" else int(value)
            questions = [prepare_question(item, processor, max_num_tiles=tiles) for item in items]
            rate = value if kind == "evs" else 0.0
            for label, model in models.items():
                contenders[suite.name, label, value] = Contender(model, questions, rate)
        measured = measure_speed(list(contenders.values()), num_new_tokens=num_new_tokens)
        speeds.update(zip(contenders, measured, strict=True))
    return speeds


def _make_point(
    label: str,
    suite: str,
    value: float,
    runs: Mapping[tuple[str, float], RunResult],
    first: float,
    speed: Speed,
) -> Point:
    answers = runs[label, value].select(suite)
    baseline = runs[label, first].select(suite)
    (score,) = bootstrap_intervals([(a.score,) for a in answers])
    kls = [(a.kl,) for a in answers if a.kl is not None]
    return Point(
        label=label,
        suite=suite,
        value=value,
        score=score,
        difference=paired_difference([a.score for a in baseline], [a.score for a in answers]),
        kl=bootstrap_intervals(kls)[0] if len(kls) == len(answers) else None,
        visual_tokens=sum(a.num_visual_tokens for a in answers) / len(answers),
        speed=speed,
    )


def _check_values(kind: SweepKind, values: Sequence[float]) -> None:
    if len(set(values)) < len(values):
        raise DataError(f"sweep: each value may be given once, got {', '.join(map(str, values))}")
    for value in values:
        if kind == "evs":
            fits, required = 0 <= value < 1, "a rate from 0 to below 1"
        else:
            fits = 1 <= value <= MOST_TILES and value == int(value)
            required = (
                f"a whole number of tiles from 1 to {MOST_TILES}, as every grid of so many is tried"
            )
        if not fits:
            raise DataError(f"sweep {kind}: --value: required {required}, got {value:g}")


def _check_media(kind: SweepKind, suites: Sequence[Suite]) -> None:
    for suite in suites:
        if not (suite.has_videos if kind == "evs" else suite.has_images):
            what = "videos" if kind == "evs" else "images"
            raise DataError(f"sweep {kind}: the suite {suite.name} has no {what}")
