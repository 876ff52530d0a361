"""Curves on disk: what ``nvvl sweep`` has measured and ``nvvl report`` draws.

``sweep-evs.json`` and ``sweep-tiles.json`` have accuracy against speed while one setting changes,
``depth.json`` noise along the layers. No torch here: curves are drawn from these files alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from nvvl.errors import DataError, OutputError, writing
from nvvl.reports.compare import Interval
from nvvl.reports.json_values import read_object

_Curves = TypeVar("_Curves")

SweepKind = Literal["evs", "tiles"]

CurveKind = Literal["evs", "tiles", "depth"]

DEPTH_NAME = "depth.json"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` measurements."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model answered.

    Attributes:
        first_token_ms: from pixels to the first token.
        tokens_per_s: tokens written over the whole time, the first token's wait included.
        num_new_tokens: tokens written for each question.
    """

    first_token_ms: Spread
    tokens_per_s: Spread
    num_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model on one suite, at one value of the setting.

    Attributes:
        value: pruning rate, or most tiles.
        score: of the suite's metric.
        difference: to the first value of the same model, item by item.
        kl: mean KL(teacher || model) in nats, the teacher being shown everything; None without one.
        visual_tokens: mean image tokens of a prompt.
    """

    label: str
    suite: str
    value: float
    score: Interval
    difference: Interval
    kl: Interval | None
    visual_tokens: float
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Curves of one setting.

    Attributes:
        metrics: metric of each suite.
        points: by suite, model and value, in this order.
        machine: what the times were taken on.
        num_timed: questions that were timed.
        notes: values that were left out, and what no value changes, in words.
    """

    kind: SweepKind
    metrics: dict[str, str]
    points: tuple[Point, ...]
    num_items: int
    num_timed: int
    seed: int
    dtype: str
    machine: str
    nvvl_version: str
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> "CurvePlan":
        """What was measured."""
        return CurvePlan(
            kind=self.kind,
            labels=tuple(dict.fromkeys(point.label for point in self.points)),
            suites=tuple(self.metrics),
            values=tuple(dict.fromkeys(point.value for point in self.points)),
            num_items=self.num_items,
            num_timed=self.num_timed,
            seed=self.seed,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """What quantization does at one layer.

    Attributes:
        kind: mamba, mlp or attention.
        sqnr_db: infinite where the hidden states are equal, written as null.
    """

    layer: int
    kind: str
    sqnr_db: float | None
    kl_through: Interval
    kl_alone: Interval


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The curves of some models against their BF16 source.

    Attributes:
        layers: by label.
        model_sha256: `nvvl.reports.run.fingerprint` of each model's folder, by label; empty where
            it was not recorded.
        reference_sha256: the same of their BF16 source; None as above.
    """

    suites: tuple[str, ...]
    num_items: int
    seed: int
    dtype: str
    layers: dict[str, tuple[LayerNoise, ...]]
    nvvl_version: str
    model_sha256: dict[str, str] = field(default_factory=dict)
    reference_sha256: str | None = None

    @property
    def plan(self) -> "CurvePlan":
        """What was measured."""
        return CurvePlan(
            kind="depth",
            labels=tuple(self.layers),
            suites=self.suites,
            num_items=self.num_items,
            seed=self.seed,
            dtype=self.dtype,
            model_sha256=self.model_sha256,
            reference_sha256=self.reference_sha256,
        )


@dataclass(frozen=True, kw_only=True)
class CurvePlan:
    """What curves are, or are to be, measured.

    Attributes:
        labels: of the models.
        suites: their names.
        values: of the setting that changes, the one that others are compared with first.
        model_sha256: as in `Depth`; runs of `evaluate` know it of the other kinds.
    """

    kind: CurveKind
    labels: tuple[str, ...]
    suites: tuple[str, ...]
    values: tuple[float, ...] = ()
    num_items: int
    num_timed: int | None = None
    seed: int
    dtype: str
    model_sha256: Mapping[str, str] = field(default_factory=dict)
    reference_sha256: str | None = None

    def describe_lost(self, present: "CurvePlan") -> str | None:
        """Say what curves that are there have and these do not; None if these have all of it."""
        subjects = {*self.labels, *self.suites}
        lost = [name for name in (*present.labels, *present.suites) if name not in subjects]
        lost += [f"--value {value:g}" for value in present.values if value not in self.values]
        if lost:
            return f"curves of {', '.join(lost)},"
        if present.values[:1] != self.values[:1]:
            return f"differences to {present.values[0]:g},"
        for name, before, now in (
            ("--items", present.num_items, self.num_items),
            ("--timed", present.num_timed, self.num_timed),
            ("--seed", present.seed, self.seed),
            ("dtype", present.dtype, self.dtype),
        ):
            if before != now:
                return f"curves with {name} {before}, asked for {now},"
        for label, sha256 in present.model_sha256.items():
            if sha256 != self.model_sha256[label]:
                return f"curves of {label} with other weights,"
        if present.reference_sha256 not in (None, self.reference_sha256):
            return "curves against another --teacher,"
        return None


def curves_path(kind: CurveKind, out: Path) -> Path:
    """Return where the curves of a kind lie in a folder of ``nvvl sweep``."""
    return out / (DEPTH_NAME if kind == "depth" else f"sweep-{kind}.json")


def load_sweep(path: Path) -> Sweep:
    """Read a ``sweep-KIND.json``.

    Raises:
        DataError: if it is missing or something else, or lacks points of a suite.
    """
    sweep = _load(path, Sweep, "nvvl sweep")
    suites = {point.suite for point in sweep.points}
    if not suites or suites != set(sweep.metrics):
        raise DataError(
            f"{path}: required points of the suites that have a metric, "
            f"{', '.join(sweep.metrics) or 'none'}, got points of {', '.join(suites) or 'none'}; "
            "run nvvl sweep again"
        )
    return sweep


def load_depth(path: Path) -> Depth:
    """Read a ``depth.json``.

    Raises:
        DataError: if it is missing or something else, or lacks layers.
    """
    depth = _load(path, Depth, "nvvl sweep depth")
    if not depth.layers or not all(depth.layers.values()):
        raise DataError(
            f"{path}: required layers of each model, and a model; run nvvl sweep depth again"
        )
    return depth


def _load(path: Path, cls: type[_Curves], verb: str) -> _Curves:
    try:
        return read_object(cls, json.loads(path.read_text(encoding="utf-8")), "curves")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, DataError) as error:
        raise DataError(f"{path}: required what {verb} has written ({error})") from None


def load_curves(out: Path) -> tuple[list[Sweep], list[Depth]]:
    """Read what a folder holds of sweeps and depths.

    Raises:
        DataError: if it holds neither, or one that is not what it should be.
    """
    paths = [curves_path(kind, out) for kind in get_args(SweepKind)]
    sweeps = [load_sweep(path) for path in paths if path.is_file()]
    depth = curves_path("depth", out)
    depths = [load_depth(depth)] if depth.is_file() else []
    if not sweeps and not depths:
        names = " and no ".join(path.name for path in (*paths, depth))
        raise DataError(f"{out}: has no {names}; give a folder of nvvl sweep")
    return sweeps, depths


def make_curves_folder(kind: CurveKind, out: Path) -> None:
    """Make the folder of curves that are to be measured, if needed.

    Raises:
        OutputError: if they cannot be written there.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: required a folder for the sweep, got a file; give another --out")
    path = curves_path(kind, out)
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OutputError(f"{path}: required a file, got a folder; give another --out")


def require_replaceable(plan: CurvePlan, out: Path, *, overwrite: bool) -> None:
    """Refuse to replace curves that the new ones have no equal of.

    Args:
        plan: what is to be measured.
        out: the folder it is to be written to.
        overwrite: replace what is there all the same.

    Raises:
        OutputError: if curves of other models, suites, values or settings are there.
        DataError: if what is there cannot be read.
    """
    path = curves_path(plan.kind, out)
    if overwrite or not path.exists():
        return
    present: Sweep | Depth = load_depth(path) if plan.kind == "depth" else load_sweep(path)
    lost = plan.describe_lost(present.plan)
    if lost:
        raise OutputError(
            f"{path}: has {lost} which would be lost; give another folder, measure them again with "
            "these, or say --overwrite"
        )


def write_curves(curves: Sweep | Depth, out: Path) -> None:
    """Write the file of curves into a folder, made if needed.

    Raises:
        OutputError: if it cannot be written.
    """
    path = curves_path(curves.kind if isinstance(curves, Sweep) else "depth", out)
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(curves), indent=2) + "\n", encoding="utf-8")
